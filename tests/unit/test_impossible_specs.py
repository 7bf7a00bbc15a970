"""Specs that cannot be: each is refused when it is loaded and when it is validated, with all that is wrong at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.certificates import SPLITS, make_certificate
from tests.tiny import LAYERS, VOCAB, constant_gate, random_bridges, verifier_ref
from viasd_calib.cli import main
from viasd_calib.errors import SpecError
from viasd_calib.slim.checking import tensor_misfits
from viasd_calib.slim.parts.bridges import bridges_ref, save_bridges
from viasd_calib.slim.parts.head_vocab import save_head_ids
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, save_widths
from viasd_calib.spec import (
    AdapterRef,
    Decoding,
    Evidence,
    Gates,
    PromptLookupDraft,
    RelativeCost,
    Route,
    RoutingSpec,
    load_spec,
    save_spec,
    spec_problems,
    tensor_file,
)

HASH = "0123456789abcdef" * 4
EVERY_LAYER = list(range(LAYERS))


def document() -> dict[str, Any]:
    """A spec that could have been, as JSON; nothing of it needs tensors."""
    return RoutingSpec(
        verifier=verifier_ref(),
        draft=PromptLookupDraft(),
        route=Route(
            attention_skip=[1],
            mlp_skip=[2],
            relative_cost=RelativeCost(measured={4: 0.5}, device="cpu", dtype="float32"),
        ),
        gates=Gates(
            draft=constant_gate("draft_margin", 0.0),
            slim=constant_gate("pending", 0.0),
            accept_at=0.9,
            regenerate_at=0.8,
        ),
        decoding=Decoding(audit="off"),
        certificate=make_certificate(),
        evidence=Evidence(
            acceptance_length=2.5, rejection_rate=0.2, full_passes_per_token=0.4,
            tier_shares={"accept": 0.5, "regenerate": 0.2, "escalate": 0.3}, speedup_vs={"autoregressive": 1.5},
            hardware={},
        ),
    ).model_dump(mode="json")  # fmt: skip


SHALLOW = {"kind": "shallow", "num_layers": 1, "head_vocab": 2, "taps": [1], "tensors": {"path": "d", "sha256": HASH}}

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"certificate.observed": 0.03}, "the observed loss 0.03 lies above the bound 0.02"),
    ({"certificate.observed": None}, "a bound of 0.02 without an observed loss"),
    ({"certificate.observed": -0.1}, "certificate.observed: Input should be greater than or equal to 0"),
    ({"certificate.p_value": 0.99}, "a p-value of 0.99 does not show the bound with confidence 0.95"),
    ({"certificate.p_value": 0.06}, "a p-value of 0.06 does not show the bound with confidence 0.95"),
    ({"certificate.p_value": None}, "a bound of 0.02 without a p-value"),
    ({"certificate.p_value": 1.5}, "certificate.p_value: Input should be less than or equal to 1"),
    ({"certificate.p_value": 0.0001}, "no 300 prompts have a p-value as small as 0.0001"),
    ({"certificate.n_prompts": 1}, "1 prompts cannot show a bound of 0.02 with confidence 0.95, .* it takes 149"),
    ({"certificate.n_prompts": 148}, "148 prompts cannot show a bound"),
    ({"certificate.n_prompts": 0}, "0 prompts cannot show a bound"),
    ({"certificate.candidates_tested": 0}, "a bound of 0.02, but no candidate was tested"),
    ({"certificate.bound": 0.0}, "certificate.bound: Input should be greater than 0"),
    ({"certificate.bound": 1.0}, "certificate.bound: Input should be less than 1"),
    ({"certificate.confidence": 1.0}, "certificate.confidence: Input should be less than 1"),
    ({"certificate.max_new_tokens": 0}, "certificate.max_new_tokens: Input should be greater than 0"),
    ({"certificate.procedure": ""}, "certificate.procedure: String should have at least 1 character"),
    ({"certificate.split_sha256.fit": SPLITS["calibrate"]}, "the splits fit and calibrate hold the same prompts"),
    ({"certificate.split_sha256.test": SPLITS["calibrate"]}, "the splits calibrate and test hold the same prompts"),
    ({"certificate": None}, "nothing certifies decoding.audit 'off'"),
    ({"evidence.tier_shares.accept": 0.9}, "the shares of the tiers sum to 1.4, not to 1"),
    ({"evidence.tier_shares.accept": 1.2}, "evidence.tier_shares.accept: Input should be less than or equal to 1"),
    ({"evidence.speedup_vs.autoregressive": 0.0}, "evidence.speedup_vs.autoregressive: Input should be greater than 0"),
    ({"evidence.acceptance_length": 0.0}, "evidence.acceptance_length: Input should be greater than 0"),
    ({"evidence.full_passes_per_token": -1.0}, "evidence.full_passes_per_token: Input should be greater"),
    ({"route.relative_cost.measured": {"4": 0.0}}, "route.relative_cost.measured.4: Input should be greater than 0"),
    ({"route.relative_cost.measured": {"0": 0.5}}, "route.relative_cost.measured.0.*greater than or equal to 1"),
    ({"route.relative_cost.measured": {}}, "route.relative_cost.measured: Dictionary should have at least 1 item"),
    (
        {"route.attention_skip": EVERY_LAYER, "route.mlp_skip": EVERY_LAYER},
        "the route skips every sublayer of the verifier",
    ),
    ({"route.attention_skip": [LAYERS]}, f"route.attention_skip names layer {LAYERS}, the verifier has layers 0 to 3"),
    (
        {"route.head_vocab": {"size": VOCAB + 1, "tensors": {"path": "h", "sha256": HASH}}},
        "route.head_vocab has 25 output tokens, the verifier has 24",
    ),
    ({"draft": {**SHALLOW, "taps": [5]}}, "the drafter reads the verifier after layer 5, it has 4"),
    ({"draft": {**SHALLOW, "head_vocab": 99}}, "the drafter has 99 output tokens, the verifier has 24"),
    ({"draft": {"kind": "causal_lm", "name_or_path": ""}}, "name_or_path: String should have at least 1 character"),
    (
        {
            "draft": SHALLOW,
            "route.head_vocab": {"size": 2, "tensors": {"path": "d", "sha256": HASH[::-1]}},
        },
        "two parts name d with different hashes",
    ),
    ({"draft": {**SHALLOW, "tensors": {"path": ".", "sha256": HASH}}}, "must be a path inside the spec's folder"),
    ({"gates.slim.features": ["full_entropy"]}, "gates.slim: there is no feature 'full_entropy'; fit the gates"),
    ({"gates.slim.features": ["draft_depth"]}, "gates: the slim gate looks at 'draft_depth', which is not known"),
    ({"gates.draft.features": ["slim_margin"]}, "gates: the draft gate looks at 'slim_margin', which is not known"),
    ({"gates.slim.weight": [1.0, 2.0]}, "gates.slim: features, mean, scale and weight must be of one length"),
    (
        {"gates.slim.features": ["pending", "pending"], "gates.slim.mean": [0.0, 0.0], "gates.slim.scale": [1.0, 1.0]},
        "gates.slim: feature 'pending' is given 2 times",
    ),
    ({"gates.slim.scale": [0.0]}, "gates.slim: scale must be positive"),
    ({"gates.regenerate_at": 0.0}, "gates.regenerate_at: Input should be greater than 0"),
    ({"gates.accept_at": -0.5}, "gates.accept_at: Input should be greater than 0"),
    ({"decoding.temperature_scope": [-1.0]}, "decoding.temperature_scope.0: Input should be greater than"),
    ({"decoding.temperature_scope": []}, "decoding.temperature_scope: List should have at least 1 item"),
    ({"decoding.tolerance": 1.5}, "decoding.tolerance: Input should be less than or equal to 1"),
    ({"verifier.num_layers": 0}, "verifier.num_layers: Input should be greater than 0"),
    ({"verifier.name_or_path": ""}, "verifier.name_or_path: String should have at least 1 character"),
    ({"verifier.architecture": ""}, "verifier.architecture: String should have at least 1 character"),
    ({"producer.version": ""}, "producer.version: String should have at least 1 character"),
    ({"verifier.revision": "sha256:zz"}, "verifier.revision: String should match pattern"),
    ({"gates.accept_at": True}, "gates.accept_at: Input should be a valid number"),
    ({"certificate.bound": "0.02"}, "certificate.bound: Input should be a valid number"),
    ({"verifier.num_layers": "4"}, "verifier.num_layers: Input should be a valid integer"),
    ({"decoding.temperature_scope": [0, 0.0]}, "decoding.temperature_scope: temperatures must be given once each"),
    ({"evidence.acceptance_length": 0.9}, "0.9 tokens a full pass are not 0.4 full passes a token"),
    ({"evidence.full_passes_per_token": 5.0}, "2.5 tokens a full pass are not 5 full passes a token"),
    (
        {"certificate.bound": None, "certificate.n_prompts": 0, "decoding.audit": "strict"},
        "an observed loss or a p-value of 0 prompts",
    ),
    ({"draft": {**SHALLOW, "num_layers": 5}}, "the drafter has 5 layers, the verifier has 4"),
    ({"surprise": 1}, "surprise: is no entry that this release knows; remove it"),
    ({"certificate.surprise": 1}, "certificate.surprise: is no entry that this release knows"),
]  # fmt: skip


def write(folder: Path, changes: Mapping[str, Any]) -> Path:
    """A spec with some entries changed, by their paths."""
    changed = document()
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = changed
        for name in parents:
            inner = inner[name]
        inner[last] = value
    target = folder / "routing.json"
    target.write_text(json.dumps(changed))
    return target


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=[message[:48] for _, message in IMPOSSIBLE])
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, changes)
    assert re.search(message, "\n".join(spec_problems(path)))
    with pytest.raises(SpecError, match=r"routing\.json: .*; export it again or mend that entry"):
        load_spec(path)


def test_what_can_be_is_not_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {})
    assert spec_problems(path) == []
    assert load_spec(path).certified_bound == 0.02
    needed = 149
    write(tmp_path, {"certificate.n_prompts": needed, "certificate.p_value": 0.98**needed})
    assert spec_problems(path) == []
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    write(tmp_path, {"certificate.split_sha256": {"fit": empty, "calibrate": "a" * 64, "test": empty}})
    assert spec_problems(path) == []


def test_validate_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path,
        {
            "certificate.observed": 0.03,
            "certificate.p_value": 0.99,
            "gates.slim.features": ["full_entropy"],
            "route.attention_skip": [7],
            "draft": SHALLOW,
            "surprise": 1,
        },
    )
    assert main(["validate", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("routing.json is not valid, 6 problems:")
    told = "\n".join(lines[1:])
    assert len(lines) == 7
    for part in ("observed loss 0.03", "p-value of 0.99", "full_entropy", "names layer 7", "surprise", "d is missing"):
        assert part in told, part
    with pytest.raises(SpecError, match=r"\(and . more, see viasd validate\)"):
        load_spec(path)


def with_tensors(folder: Path) -> RoutingSpec:
    """A spec with bridges, narrow MLPs, a reduced head and an adapter that fit it."""
    route = Route(attention_skip=[1, 2], mlp_skip=[1])
    save_bridges(random_bridges(route), folder / "bridges.safetensors")
    part = "self_attn.q_proj.lora_{}.default.weight"
    kept = [layer for layer in range(LAYERS) if layer not in route.attention_skip]
    adapter = {f"{layer}.{part.format('A')}": torch.zeros(2, 16) for layer in kept}
    adapter |= {f"{layer}.{part.format('B')}": torch.zeros(16, 2) for layer in kept}
    save_file(adapter, folder / "adapter.safetensors")
    spec = RoutingSpec(
        verifier=verifier_ref(),
        draft=PromptLookupDraft(),
        route=route.model_copy(
            update={
                "bridges": bridges_ref(folder / "bridges.safetensors", folder, None),
                "mlp_keep": save_widths({3: KeptNeurons(torch.arange(8), 4)}, folder / "widths.safetensors", folder),
                "head_vocab": save_head_ids(torch.tensor([2, 5]), folder / "head.safetensors", folder),
                "adapter": AdapterRef(
                    rank=2, alpha=4, targets=["q_proj"], tensors=tensor_file(folder / "adapter.safetensors", folder)
                ),
            }
        ),
        gates=Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
    )
    save_spec(spec, folder / "routing.json")
    return spec


def test_tensors_that_fit_are_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tensor_misfits(with_tensors(tmp_path), tmp_path) == []
    assert main(["validate", str(tmp_path / "routing.json")]) == 0
    assert "valid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"attention_skip": [1, 2, 3]}, ["attention_3.up.bias does not fit the route", "3.self_attn.*of no sublayer"]),
        (
            {"attention_skip": [1]},
            ["2.self_attn.q_proj.lora_A.default.weight is missing"],
        ),
        ({"bridges": {"rank": 3}}, [r"bridges\.safetensors: .* does not fit the route"]),
        ({"head_vocab": {"size": 3}}, ["the spec names 3 token ids"]),
        ({"mlp_keep": {"keep": {2: 4}}}, ["is of layers 3, route.mlp_keep names others"]),
        ({"mlp_keep": {"keep": {3: 8}}}, ["keeps 8 neurons of layer 3, the verifier has 8"]),
        ({"adapter": {"rank": 3}}, ["the spec names rank 3"]),
        ({"adapter": {"kind": "dora", "folded": True}}, ["no adapter of kind dora; export the spec again"]),
        ({"adapter": {"targets": ["nope"]}}, ["q_proj is none of the targets that the spec names: nope"]),
        ({"adapter": {"targets": ["q_proj", "k_proj"]}}, ["holds nothing for the target k_proj"]),
    ],
)
def test_tensors_of_another_route_are_refused(
    tmp_path: Path, changes: dict[str, Any], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Who skips one sublayer more by hand has neither bridge nor adapter for what is left."""
    spec = with_tensors(tmp_path)
    updates = {
        name: value if isinstance(value, list) else getattr(spec.route, name).model_copy(update=value)
        for name, value in changes.items()
    }
    save_spec(spec.model_copy(update={"route": spec.route.model_copy(update=updates)}), tmp_path / "routing.json")
    assert main(["validate", str(tmp_path / "routing.json")]) == 1
    told = capsys.readouterr().err
    for message in messages:
        assert re.search(message, told), told
