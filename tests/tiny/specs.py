"""Specs and latency profiles of tiny verifiers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.certificates import make_certificate
from tests.tiny.drafters import tiny_shape
from tests.tiny.folders import TinyFolder, save_tiny
from tests.tiny.gates import constant_gate
from tests.tiny.models import LAYERS, VOCAB
from viasd_calib.models import load_verifier
from viasd_calib.profiling.profile import LatencyProfile, Measured, PassShape, ProfileSettings
from viasd_calib.spec import (
    AdapterRef,
    AddedMemory,
    BridgesRef,
    CausalLMDraft,
    Certificate,
    Evidence,
    Gates,
    HeadVocab,
    LowBitWeights,
    MlpWidths,
    PromptHashes,
    PromptLookupDraft,
    RelativeCost,
    Route,
    RoutingSpec,
    ShallowDraft,
    VerifierRef,
    save_spec,
    tensor_file,
)


def verifier_ref(**changes: Any) -> VerifierRef:
    """Identity of a verifier that exists nowhere."""
    entries: dict[str, Any] = {
        "name_or_path": "tiny",
        "architecture": "LlamaForCausalLM",
        "num_layers": LAYERS,
        "hidden_size": 16,
        "vocab_size": VOCAB,
        "config_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "dtype": "float32",
    }
    return VerifierRef(**{**entries, **changes})


def tiny_spec(verifier: TinyFolder, folder: Path, certificate: Certificate | None = None) -> Path:
    """A spec for a tiny verifier, in ``folder``, that needs no tensors."""
    path = folder / "routing.json"
    save_spec(
        RoutingSpec(
            verifier=load_verifier(str(verifier)).ref,
            draft=PromptLookupDraft(),
            route=Route(attention_skip=[1], mlp_skip=[2]),
            gates=Gates(convention="ratio", accept_at=0.9, escalate_below=0.5),
            certificate=certificate,
            prompts=PromptHashes(fit=[]),
        ),
        path,
    )
    return path


def drafted_spec(verifier: TinyFolder, folder: Path) -> Path:
    """A spec for a tiny verifier, in ``folder``, drafting with a model beside it; all scores of its gates are 0.5."""
    save_tiny(folder / "draft", seed=4)
    path = folder / "routing.json"
    gates = Gates(
        draft=constant_gate("draft_margin", 0.0),
        slim=constant_gate("slim_margin", 0.0),
        accept_at=0.4,
        regenerate_at=0.4,
    )
    save_spec(
        RoutingSpec(
            verifier=load_verifier(str(verifier)).ref,
            draft=CausalLMDraft(name_or_path=str(folder / "draft")),
            route=Route(attention_skip=[1]),
            gates=gates,
        ),
        path,
    )
    return path


def tiny_profile(settings: ProfileSettings, cost: Callable[[PassShape], float]) -> LatencyProfile:
    """A latency profile of that verifier, with made-up times."""
    measured = [
        Measured(**s._asdict(), seconds=cost(s), low=0.9 * cost(s), high=1.2 * cost(s)) for s in settings.shapes()
    ]
    return LatencyProfile(
        verifier=verifier_ref(),
        draft=PromptLookupDraft(),
        route=Route(attention_skip=[1]),
        backend="eager",
        dtype="float32",
        device="cpu",
        hardware={"device": "abacus"},
        settings=settings,
        measured=tuple(measured),
    )


def small_gates(**changes: Any) -> Gates:
    """Calibrated gates of that verifier, with ``changes``."""
    entries = {"slim": constant_gate("slim_entropy", 0.0), "accept_at": 0.9, "regenerate_at": 0.8}
    return Gates(**{**entries, **changes})


def small_spec(**changes: Any) -> RoutingSpec:
    """A spec of that verifier that needs no tensors, with ``changes``."""
    entries: dict[str, Any] = {
        "verifier": verifier_ref(),
        "draft": PromptLookupDraft(),
        "route": Route(attention_skip=[1, 2], mlp_skip=[2]),
        "gates": small_gates(),
    }
    return RoutingSpec(**{**entries, **changes})


def small_document() -> dict[str, Any]:
    """``small_spec()`` as JSON."""
    return small_spec().model_dump(mode="json")


def write_document(path: Path, document: object) -> Path:
    """Write ``document`` as JSON, whether a spec could read it or not."""
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def full_spec(folder: Path) -> RoutingSpec:
    """A spec with every part there is, and its tensor files in ``folder``."""
    (folder / "draft.safetensors").write_bytes(b"draft")
    (folder / "slim").mkdir()
    (folder / "slim" / "adapter.safetensors").write_bytes(b"adapter")
    adapter = tensor_file(folder / "slim" / "adapter.safetensors", folder)
    (folder / "slim" / "head.safetensors").write_bytes(b"head")
    (folder / "slim" / "bridges.safetensors").write_bytes(b"bridges")
    (folder / "slim" / "widths.safetensors").write_bytes(b"widths")
    return small_spec(
        draft=ShallowDraft(**tiny_shape().model_dump(), tensors=tensor_file(folder / "draft.safetensors", folder)),
        route=Route(
            attention_skip=[0],
            mlp_keep=MlpWidths(keep={1: 20, 2: 9}, tensors=tensor_file(folder / "slim" / "widths.safetensors", folder)),
            head_vocab=HeadVocab(size=5, tensors=tensor_file(folder / "slim" / "head.safetensors", folder)),
            bridges=BridgesRef(rank=3, tensors=tensor_file(folder / "slim" / "bridges.safetensors", folder)),
            adapter=AdapterRef(rank=4, alpha=8.0, targets=["q_proj"], folded=True, tensors=adapter),
            low_bit=LowBitWeights(attention={"8": [1, 3]}, mlp={"4": [2]}, head=8),
            relative_cost=RelativeCost(measured={1: 0.5, 8: 0.61}, device="cpu", dtype="float32"),
            memory=AddedMemory(bytes=9000, share=0.4),
        ),
        certificate=make_certificate(),
        evidence=Evidence(
            acceptance_length=2.5,
            rejection_rate=0.2,
            full_passes_per_token=0.4,
            tier_shares={"accept": 0.5, "regenerate": 0.2, "escalate": 0.3},
            speedup_vs={"autoregressive": 1.5, "speculative": 1.1},
            hardware={"cpu": "two cores"},
        ),
    )
