"""What a policy's digest looks at, and what not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_certificate
from tests.tiny import constant_gate, verifier_ref
from viasd_calib.digest import policy_digest
from viasd_calib.spec import (
    BridgesRef,
    CausalLMDraft,
    Decoding,
    Evidence,
    Gates,
    Producer,
    PromptLookupDraft,
    RelativeCost,
    Route,
    RoutingSpec,
    TensorFile,
    load_spec,
    save_spec,
)

BRIDGES = BridgesRef(tensors=TensorFile(path="bridges/b.safetensors", sha256="7" * 64))
OTHER_TENSORS = TensorFile(path="bridges/b.safetensors", sha256="6" * 64)
MOVED_TENSORS = TensorFile(path="b.safetensors", sha256="7" * 64)
SPEC = RoutingSpec(
    verifier=verifier_ref(weights_sha256="8" * 64),
    draft=CausalLMDraft(name_or_path="drafter"),
    route=Route(
        attention_skip=[1],
        mlp_skip=[1],
        bridges=BRIDGES,
        relative_cost=RelativeCost(measured={4: 0.5}, device="cpu", dtype="float32"),
    ),
    gates=Gates(slim=constant_gate("pending", 0.0), accept_at=0.9, regenerate_at=0.8),
)


def changed(part: str, **updates: Any) -> RoutingSpec:
    """``SPEC`` with other entries in one part, or of its own for the part ''."""
    if not part:
        return SPEC.model_copy(update=updates)
    return SPEC.model_copy(update={part: getattr(SPEC, part).model_copy(update=updates)})


DECIDING = {
    "weights": changed("verifier", weights_sha256="9" * 64),
    "no hash of weights": changed("verifier", weights_sha256=None),
    "configuration": changed("verifier", config_sha256="9" * 64),
    "tokenizer": changed("verifier", tokenizer_sha256="9" * 64),
    "architecture": changed("verifier", architecture="Qwen2ForCausalLM"),
    "number format": changed("verifier", dtype="bfloat16"),
    "draft": changed("", draft=PromptLookupDraft()),
    "draft model": changed("draft", name_or_path="another"),
    "draft revision": changed("draft", revision="main"),
    "draft weights": changed("draft", quantize="int8"),
    "skipped": changed("route", attention_skip=[2]),
    "bridges": changed("route", bridges=None),
    "tensors": changed("route", bridges=BRIDGES.model_copy(update={"tensors": OTHER_TENSORS})),
    "carry": changed("route", bridges=BRIDGES.model_copy(update={"carry": True})),
    "bound": changed("gates", accept_at=0.91),
    "stop": changed("gates", draft=constant_gate("draft_depth", 0.0), draft_stop_below=0.4),
    "weights of a gate": changed("gates", slim=constant_gate("pending", 0.1)),
    "features of a gate": changed("gates", slim=constant_gate("log_ratio", 0.0)),
    "audit": changed("decoding", audit="off"),
    "draft length": changed("decoding", draft_length=3),
    "pending": changed("decoding", max_pending=3),
    "when drafting pays": changed("decoding", drafting_pays_at=0.3),
    "drafter": changed("decoding", drafter="slim"),
    "temperatures": changed("decoding", temperature_scope=[0.0, 1.0]),
}  # fmt: skip
INDIFFERENT = {
    "place of the verifier": changed("verifier", name_or_path="/elsewhere", revision="v2"),
    "producer": changed("", producer=Producer(version="9.9", commit="abc")),
    "schema version": changed("", schema_version="1.0"),
    "certificate": changed("", certificate=make_certificate()),
    "evidence": changed(
        "",
        evidence=Evidence(
            acceptance_length=2.0, rejection_rate=0.1, full_passes_per_token=0.5,
            tier_shares={}, speedup_vs={}, hardware={},
        ),
    ),
    "cost": changed("route", relative_cost=None),
    "calibration error": changed(
        "gates", slim=constant_gate("pending", 0.0).model_copy(update={"expected_calibration_error": 0.02})
    ),
    "place of tensors": changed("route", bridges=BRIDGES.model_copy(update={"tensors": MOVED_TENSORS})),
}  # fmt: skip


@pytest.mark.parametrize("other", DECIDING.values(), ids=DECIDING)
def test_what_decides_how_a_spec_decodes_is_in_the_digest(other: RoutingSpec) -> None:
    assert policy_digest(other) != policy_digest(SPEC)


def test_no_two_policies_have_one_digest() -> None:
    assert len({policy_digest(other) for other in DECIDING.values()}) == len(DECIDING)


@pytest.mark.parametrize("other", INDIFFERENT.values(), ids=INDIFFERENT)
def test_what_does_not_is_not(other: RoutingSpec) -> None:
    assert other != SPEC
    assert policy_digest(other) == policy_digest(SPEC)


def test_weights_without_a_hash_are_told_apart_by_their_revision() -> None:
    one, other = (changed("verifier", weights_sha256=None, revision=revision) for revision in ("v1", "v2"))
    assert policy_digest(one) != policy_digest(other)
    named, hashed = changed("verifier", weights_sha256=None, revision=f"sha256:{'8' * 64}"), SPEC
    assert policy_digest(named) == policy_digest(hashed)


def test_a_digest_survives_writing(tmp_path: Path) -> None:
    spec = changed("route", bridges=None)
    save_spec(spec, tmp_path / "routing.json")
    assert policy_digest(load_spec(tmp_path / "routing.json")) == policy_digest(spec)
    assert policy_digest(changed("", decoding=Decoding())) == policy_digest(SPEC)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("smollm2-135m/routing.json", "5ac015a2c12932d8151015aa19b97cfe27c82059455fe38a681db2892e916850"),
        ("smollm2-135m/offload.json", "86a6cfdceb540d053f04925b61196f6dfa9fb84126d79d1e857ca1b46c85bbca"),
        ("qwen2.5-coder-1.5b/routing.json", "ce797009fec7a4052c03153caeef1942fdf259e778093b4f9c0f450c98f1acd1"),
        ("qwen2.5-coder-1.5b/offload.json", "f916a9b2ee9546bfcd75eb25aa36e77a94cb6a9509e49dfa636ccd0a99f64aea"),
    ],
)
def test_the_digests_of_the_shipped_specs(name: str, digest: str) -> None:
    """A digest that changes between releases voids every benchmark that was recorded before."""
    assert policy_digest(load_spec(Path("checkpoints") / name)) == digest


def test_a_draft_model_of_known_weights_may_lie_anywhere() -> None:
    one, other, retrained = (
        changed("draft", name_or_path=place, weights_sha256=digit * 64)
        for place, digit in (("a", "5"), ("b", "5"), ("a", "6"))
    )
    assert policy_digest(one) == policy_digest(other)
    assert policy_digest(one) != policy_digest(retrained)
