"""Certificates that could have been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from viasd_calib.calibration.betting import betting_p_value
from viasd_calib.calibration.risk import PROCEDURE
from viasd_calib.digest import policy_digest, policy_parts
from viasd_calib.files import write_json
from viasd_calib.schema.certified_losses import CertifiedLosses
from viasd_calib.spec import Certificate, HashedFile, PromptHashes, RoutingSpec, file_sha256, save_spec

SPLITS = {"fit": "1" * 64, "calibrate": "2" * 64, "test": "3" * 64}


def make_certificate(bound: float | None = 0.02, **changes: Any) -> Certificate:
    """A certificate of 300 prompts with few losses; one that bounds nothing where ``bound`` is None."""
    entries: dict[str, Any] = {
        "bound": bound,
        "confidence": 0.95,
        "procedure": "learn-then-test",
        "candidates_tested": 4,
        "n_prompts": 300,
        "max_new_tokens": 64,
        "split_sha256": SPLITS,
        "observed": None if bound is None else 0.1 * bound,
        "p_value": None if bound is None else 0.04,
        "note": "nothing certified" if bound is None else "",
    }
    return Certificate(**{**entries, **changes})


def bind(
    spec: RoutingSpec,
    path: Path,
    losses: Sequence[float] = (0.0,) * 60,
    *,
    bound: float = 0.1,
    max_new_tokens: int = 8,
    prompts: Sequence[str] | None = None,
) -> RoutingSpec:
    """Certify a spec as ``viasd calibrate`` would on a CPU, and write it and its losses as ``viasd export`` does.

    Args:
        spec: with audit ``off`` after it.
        path: of the spec.
        losses: of each prompt, a token each.
        prompts: short hashes of these; made up where they are left out.
    """
    lossy = spec.model_copy(update={"decoding": spec.decoding.model_copy(update={"audit": "off"})})
    hashes = sorted(prompts or (f"{number:016x}" for number in range(len(losses))))
    certified = CertifiedLosses(
        policy=policy_parts(lossy),
        dtype=spec.verifier.dtype,
        backend="cpu torch",
        loss="token_divergence",
        max_new_tokens=max_new_tokens,
        rounding_gap=0.01,
        prompts=hashes,
        losses=list(losses),
        tokens=list(range(1, len(losses) + 1)),
    )
    target = path.parent / "certificate" / path.name
    write_json(target, certified)
    certificate = make_certificate(
        bound, loss=certified.loss, procedure=PROCEDURE, n_prompts=len(losses), max_new_tokens=max_new_tokens,
        observed=certified.observed, observed_by_token=certified.observed_by_token, rounding_gap=0.01, floor=0.0,
        p_value=betting_p_value(losses, bound), digest=policy_digest(lossy), dtype=certified.dtype,
        backend=certified.backend, losses=HashedFile(path=f"certificate/{path.name}", sha256=file_sha256(target)),
    )  # fmt: skip
    made_from = PromptHashes(fit=[], calibrate=hashes)
    found = lossy.model_copy(update={"certificate": certificate, "prompts": made_from})
    save_spec(found, path)
    return found
