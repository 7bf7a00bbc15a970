"""Specs and latency profiles of tiny verifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny.folders import TinyFolder
from tests.tiny.models import LAYERS, VOCAB
from viasd_calib.models import load_verifier
from viasd_calib.profiling.profile import LatencyProfile, Measured, PassShape, ProfileSettings
from viasd_calib.spec import (
    Certificate,
    Gates,
    PromptHashes,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    VerifierRef,
    save_spec,
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
