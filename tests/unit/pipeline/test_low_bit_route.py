"""A slim verifier of low bits alone, from traces to a text; nothing of it is trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import viasd_calib
from tests.tiny import LAYERS, TinyFolder, tiny_fit_options, tiny_prompts, tiny_traces
from tests.tiny.bits import priced
from viasd_calib.cli import main
from viasd_calib.errors import CalibrationError, JobWarning, MachineWarning, SpecError, UsageError
from viasd_calib.file_names import FIT_FILE
from viasd_calib.models import load_verifier
from viasd_calib.pipeline import fitted as fitted_module
from viasd_calib.prompts import SplitShares
from viasd_calib.slim import backends
from viasd_calib.slim.backends import choose_backend, fastest_dtype
from viasd_calib.slim.offload.bits_for_memory import CHOICES, bits_for_memory
from viasd_calib.slim.parts import low_bit
from viasd_calib.spec import LowBitWeights, OffloadRef, load_spec

EVERY = [*range(LAYERS)]
WHOLE = LowBitWeights(attention={"8": EVERY}, mlp={"8": EVERY}, head=8)
LOW: dict[str, Any] = {"route_choice": "whole", "adapter_rank": 0, "parts": {"low_bit": {"bits": 8}}, "max_run": 4}


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 24, max_new_tokens=12, batch_size=12, top_k=4)


def options(verifier: TinyFolder, traces: Path, out: Path, **model: Any) -> viasd_calib.FitOptions:
    return tiny_fit_options(verifier, traces, out, 2, model)


def test_it_goes_from_traces_to_a_text(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tiny_folder, traces, tmp_path / "fit", **LOW)

    def new_trainer(**_: Any) -> Any:
        raise AssertionError("there is nothing to train")

    fitted = viasd_calib.fit(given, new_trainer=new_trainer)
    assert fitted is not None
    assert [*fitted.route.entries()] == ["low_bit"]
    assert fitted.route.low_bit == WHOLE
    assert fitted.agreement > 0.8
    cost = fitted.route.relative_cost
    assert cost is not None
    assert [*cost.measured] == [1, 4, 8]
    assert cost.dtype == fastest_dtype(torch.device("cpu"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(32)[24:]), encoding="utf-8")
    spec = str(tmp_path / "spec" / "routing.json")
    viasd_calib.calibrate(
        viasd_calib.CalibrateOptions(
            fit=str(tmp_path / "fit"), out=str(tmp_path / "calibrate"), prompts=str(prompts), max_new_tokens=4,
            shares=SplitShares(fit=0.0, calibrate=1.0, test=0.0), max_loss=0.5, confidence=0.5, dtype="float32",
        )
    )  # fmt: skip
    exporting = viasd_calib.ExportOptions(calibrate=str(tmp_path / "calibrate"), out=spec, audit="strict")
    with pytest.warns(MachineWarning, match="backend eager runs sublayers in low bits, but no faster than others"):
        viasd_calib.export(exporting)
    route = load_spec(spec).route
    assert route.low_bit == WHOLE
    assert route.memory == fitted.route.memory
    files = {path.relative_to(tmp_path / "spec") for path in (tmp_path / "spec").rglob("*") if path.is_file()}
    assert {path.name for path in files if path.parts[0] != "certificate"} == {"routing.json"}, "no tensors"
    assert main(["validate", spec]) == 0
    assert "slim verifier: 0." in " ".join(capsys.readouterr().out.split())
    command = ["generate", "--spec", spec, "--prompt", "w1 w2", "--max_new_tokens", "8"]
    texts = []
    for method in ("three_tier", "autoregressive"):
        assert main([*command, "--method", method]) == 0
        texts.append(capsys.readouterr().out.splitlines()[0])
    assert texts[0] == texts[1]
    document = json.loads(Path(spec).read_text(encoding="utf-8"))
    document["route"]["low_bit"]["mlp"]["4"] = [1]
    Path(spec).write_text(json.dumps(document), encoding="utf-8")
    assert main(["validate", spec]) == 1
    assert "low_bit.mlp names layer 1 twice" in " ".join(capsys.readouterr().err.split())


def test_a_spec_decodes_in_the_format_that_was_calibrated_in(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the fit measured that low bits gain something in bfloat16, which it does not of so small a model."""
    viasd_calib.fit(options(tiny_folder, traces, tmp_path / "fit", **LOW))
    monkeypatch.setattr(fitted_module, "low_bits_have_kernels", lambda *_: True)
    file = tmp_path / "fit" / FIT_FILE
    document = json.loads(file.read_text(encoding="utf-8"))
    document["route"]["relative_cost"] = {"measured": {"4": 0.6}, "device": "cpu", "dtype": "bfloat16"}
    file.write_text(json.dumps(document), encoding="utf-8")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(26)[24:]), encoding="utf-8")
    with pytest.warns(JobWarning, match="calibrates in bfloat16"):
        found = viasd_calib.calibrate(
            viasd_calib.CalibrateOptions(
                fit=str(tmp_path / "fit"), out=str(tmp_path / "calibrate"), prompts=str(prompts), max_new_tokens=4,
                shares=SplitShares(fit=0.0, calibrate=1.0, test=0.0), allow_uncertified=True, fractions=[0.5],
            )
        )  # fmt: skip
    assert found.dtype == "bfloat16"
    spec = str(tmp_path / "spec" / "routing.json")
    exported = viasd_calib.export(viasd_calib.ExportOptions(calibrate=str(tmp_path / "calibrate"), out=spec))
    assert exported.verifier.dtype == "bfloat16"
    assert exported.route.relative_cost is not None
    assert exported.route.relative_cost.dtype == "bfloat16"


def test_what_is_distilled_is_distilled_on_low_bits(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    changes = {"target_cost": 0.7, "adapter_rank": 2, "max_run": 4, "parts": {"low_bit": {"bits": 4}}}
    fitted = viasd_calib.fit(options(tiny_folder, traces, tmp_path, **changes))
    assert fitted is not None
    route = fitted.route
    assert [*route.entries()][-1] == "low_bit"
    assert {"bridges", "adapter"} < {*route.entries()}
    assert route.low_bit is not None
    assert [*route.low_bit.bits("mlp")] == [layer for layer in EVERY if layer not in route.mlp_skip]
    assert route.mlp_skip


def test_where_nothing_has_kernels_for_them_a_fit_says_so(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "why_no_kernels", lambda *_: "this CPU has no avx512_vnni")
    words = "runs sublayers in low bits, but no faster than others.*this CPU has no avx512_vnni"
    with pytest.warns(MachineWarning, match=words):
        viasd_calib.fit(options(tiny_folder, traces, tmp_path, **LOW))


def test_memory_may_be_bounded(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    words = r"would take 0\.\d+ of q's memory more .*, and memory allows 0.2; raise --model.memory, or give fewer"
    with pytest.raises(CalibrationError, match=words):
        viasd_calib.fit(options(tiny_folder, traces, tmp_path, **LOW, memory=0.2))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"parts": {"low_bit": {"bits": 5}}},
            SpecError,
            "options of the part low_bit: bits: Input should be 16, 8, 4 or 'auto'",
        ),
        (
            {"parts": {"low_bit": {"bits": "auto", "head": 8}}},
            SpecError,
            "bits auto chooses for all; leave out attention, mlp and head, or give bits a number",
        ),
        (
            {"parts": {"low_bit": {}}, "adapter_kind": "dora"},
            CalibrationError,
            "cannot be fitted with adapter_kind dora",
        ),
        ({"memory": -1.0}, CalibrationError, "memory is -1.0; give a share of q's weights, or bytes"),
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        viasd_calib.SlimVerifierOptions(**changes)


def test_a_later_round_and_gates_go_with_low_bits(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    low = {"low_bit": {"bits": 8, "head": 16}}
    rounds = options(tiny_folder, traces, tmp_path / "rounds", target_cost=0.7, adapter_rank=2, max_run=4, parts=low)
    gated = options(
        tiny_folder, traces, tmp_path / "gates", target_cost=0.7, adapter_kind="norms", max_run=4, parts=low,
        route_choice="gates", route_steps=1, fold_adapter=False, mlp_keep=0.5, head_vocab=16,
    )  # fmt: skip
    for given in (replace(rounds, rounds=2), gated):
        fitted = viasd_calib.fit(given)
        assert fitted is not None
        low_bit = fitted.route.low_bit
        assert low_bit is not None
        assert low_bit.head is None
        assert {*low_bit.bits("attention").values()} == {8}


def test_bits_are_chosen_within_the_target(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    auto = {**LOW, "parts": {"low_bit": {"bits": "auto"}}}
    found = {}
    for cost in (0.8, 0.5, 0.3):
        out = tmp_path / str(cost)
        fitted = viasd_calib.fit(options(tiny_folder, traces, out, **auto, target_cost=cost))
        assert fitted is not None
        assert fitted.route.low_bit is not None
        choice = json.loads((out / low_bit.MEASURED_FILE).read_text(encoding="utf-8"))
        rows = [row for row in choice["measured"] if row["chosen"]]
        assert len(rows) == 2 * LAYERS + 1
        assert choice["relative_cost"] == pytest.approx(sum(row["cost"] for row in rows))
        assert choice["relative_cost"] <= cost
        kept = {row["layer"]: row["bits"] for row in rows if row["kind"] == "mlp" and row["bits"] != 16}
        assert fitted.route.low_bit.bits("mlp") == kept
        found[cost] = sum(row["kl"] for row in rows)
    assert found[0.8] < found[0.5] < found[0.3]
    with pytest.raises(SpecError, match=r"the least is 0\.250; raise target_cost, or let low_bit choose"):
        viasd_calib.fit(options(tiny_folder, traces, tmp_path / "none", **auto, target_cost=0.2))


def test_a_fit_whose_target_is_met_has_no_low_bits(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    auto = {**LOW, "parts": {"low_bit": {"bits": "auto"}}}
    with pytest.warns(JobWarning, match="bits auto leaves everything in 16 bits"):
        fitted = viasd_calib.fit(options(tiny_folder, traces, tmp_path, **auto, target_cost=1.0))
    assert fitted is not None
    assert not fitted.route.entries()
    assert fitted.agreement == 1.0
    assert fitted.route.relative_cost is None


def test_a_later_round_has_the_bits_of_the_first(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bridges and adapter were trained on them."""
    timed: list[object] = []

    def otherwise(shapes: Iterable[tuple[int, int]], tried: Sequence[int], *_: object) -> dict[Any, float]:
        """Products of the first time, and such whose choice would be another one."""
        timed.append(shapes)
        return {(shape, bits): seconds ** len(timed) for (shape, bits), seconds in priced(shapes, tried).items()}

    monkeypatch.setattr(low_bit, "product_seconds", otherwise)
    auto = {"route_choice": "whole", "adapter_rank": 2, "max_run": 4, "parts": {"low_bit": {"bits": "auto"}}}
    given = options(tiny_folder, traces, tmp_path, **auto, target_cost=0.6)
    with pytest.warns(JobWarning, match=r"bits are those of .*round-2.*low_bit\.json"):
        fitted = viasd_calib.fit(replace(given, rounds=2))
    assert fitted is not None
    first = json.loads((tmp_path / "round-1" / FIT_FILE).read_text(encoding="utf-8"))
    assert first["route"]["low_bit"] == fitted.route.model_dump(mode="json")["low_bit"]
    assert len(timed) == 1
    choices = [(place / low_bit.MEASURED_FILE).read_bytes() for place in (tmp_path, tmp_path / "round-1")]
    assert choices[0] == choices[1]


@pytest.mark.parametrize("kernels", [True, False])
def test_memory_chooses_bits_and_how_it_decodes(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    """Calibration reads layers as the fit says, in the format of its bytes, unless it is told otherwise."""
    monkeypatch.setattr(fitted_module, "low_bits_have_kernels", lambda *_: kernels)
    dtype = fastest_dtype(torch.device("cpu"))
    model = load_verifier(str(tiny_folder), dtype=dtype, layers=False).model
    memory = 10**9
    backend = choose_backend(model)
    while bits_for_memory(model, memory, backend)[0] == CHOICES[0]:
        least, memory = memory, memory - max(memory // 100, 1)
    with pytest.warns(JobWarning, match="attention in 8 bits, MLPs in 4, the head in 8; .* are read"):
        fitted = viasd_calib.fit(replace(options(tiny_folder, traces, tmp_path / "fit", **LOW), memory=memory))
    assert fitted is not None
    assert fitted.route.low_bit == LowBitWeights(attention={"8": EVERY}, mlp={"4": EVERY}, head=8)
    assert fitted.offload == OffloadRef(kind="disk", memory=memory)
    assert bits_for_memory(model, least, backend)[0] == CHOICES[0]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(32)[24:]), encoding="utf-8")
    asked = viasd_calib.CalibrateOptions(
        fit=str(tmp_path / "fit"), out=str(tmp_path / "read"), prompts=str(prompts), max_new_tokens=4, limit=5,
        shares=SplitShares(fit=0.0, calibrate=1.0, test=0.0), max_loss=0.5, confidence=0.5,
    )  # fmt: skip
    found = viasd_calib.calibrate(asked)
    assert (found.offload, found.dtype) == (fitted.offload, dtype)
    more = viasd_calib.calibrate(replace(asked, out=str(tmp_path / "more"), memory=memory + 4))
    assert more.offload == OffloadRef(kind="disk", memory=memory + 4)
    kept = viasd_calib.calibrate(replace(asked, out=str(tmp_path / "kept"), offload="none"))
    assert kept.offload is None


@pytest.mark.parametrize(
    "model",
    [
        {},
        {**LOW, "parts": {"low_bit": {"bits": 4}}},
        {**LOW, "adapter_rank": 2},
        {**LOW, "route_choice": "span"},
        {**LOW, "adapter_kind": "norms"},
        {**LOW, "mlp_keep": 0.5},
        {**LOW, "head_vocab": 16},
    ],
)
def test_memory_chooses_for_slim_verifiers_of_low_bits_alone(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    with pytest.raises(CalibrationError, match="--memory chooses the bits of a slim verifier of all layers"):
        viasd_calib.fit(replace(options(tiny_folder, traces, tmp_path / "fit", **model), memory="1GB"))
    with pytest.raises(UsageError, match="--memory is 'much'"):
        viasd_calib.fit(replace(options(tiny_folder, traces, tmp_path / "fit", **model), memory="much"))
