"""Certificates that could have been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from viasd_calib.binding import with_candidate
from viasd_calib.calibration.betting import betting_p_value
from viasd_calib.calibration.risk import PROCEDURE
from viasd_calib.digest import policy_digest, policy_parts
from viasd_calib.files import write_json
from viasd_calib.schema.certified_losses import CertifiedLosses
from viasd_calib.spec import (
    Certificate,
    CertifiedCandidate,
    GateBounds,
    HashedFile,
    PromptHashes,
    RoutingSpec,
    file_sha256,
    save_spec,
)

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
    lossy = with_audit_off(spec)
    hashes = sorted(prompts or (f"{number:016x}" for number in range(len(losses))))
    certified = made_losses(lossy, losses, hashes, max_new_tokens)
    certificate = make_certificate(
        bound, loss=certified.loss, procedure=PROCEDURE, n_prompts=len(losses), max_new_tokens=max_new_tokens,
        observed=certified.observed, observed_by_token=certified.observed_by_token, rounding_gap=0.01, floor=0.0,
        p_value=betting_p_value(losses, bound), digest=policy_digest(lossy), dtype=certified.dtype,
        backend=certified.backend, losses=write_losses(certified, path, path.name),
    )  # fmt: skip
    made_from = PromptHashes(fit=[], calibrate=hashes)
    found = lossy.model_copy(update={"certificate": certificate, "prompts": made_from})
    save_spec(found, path)
    return found


def bind_candidates(
    spec: RoutingSpec, path: Path, thresholds: Sequence[float] = (0.9, 0.6, 0.4), *, active: int | None = -1
) -> RoutingSpec:
    """The same with several certified candidates, listed and with a file of losses each.

    Args:
        spec: with calibrated gates.
        thresholds: of each candidate, most careful first.
        active: which of them the spec decodes by; None for a spec that decodes exactly.
    """
    listed: list[CertifiedCandidate] = []
    for number, threshold in enumerate(thresholds):
        changes = dict.fromkeys(("draft_accept_at", "accept_at", "regenerate_at"), threshold)
        lossy = with_audit_off(spec.model_copy(update={"gates": spec.gates.model_copy(update=changes)}))
        losses = [0.001 * number] * 60
        made = made_losses(lossy, losses, [f"{one:016x}" for one in range(60)], 8)
        digest = policy_digest(lossy)
        listed.append(
            CertifiedCandidate(
                bounds=GateBounds.of(lossy.gates), decoding=lossy.decoding, digest=digest, bound=0.1,
                observed=made.observed, observed_by_token=made.observed_by_token, p_value=betting_p_value(losses, 0.1),
                dtype=made.dtype, backend=made.backend,
                losses=write_losses(made, path, f"{path.stem}-{digest[:12]}.json"),
            )
        )  # fmt: skip
    certificate = make_certificate(
        None, loss="token_divergence", procedure=PROCEDURE, n_prompts=60, max_new_tokens=8, rounding_gap=0.01,
        floor=0.0, candidates=listed, note="exact",
    )  # fmt: skip
    known = PromptHashes(fit=[], calibrate=[f"{one:016x}" for one in range(60)])
    found = spec.model_copy(update={"certificate": certificate, "prompts": known})
    if active is not None:
        found = with_candidate(found, listed[active])
    save_spec(found, path)
    return found


def with_audit_off(spec: RoutingSpec) -> RoutingSpec:
    """A spec that decodes with audit ``off``."""
    return spec.model_copy(update={"decoding": spec.decoding.model_copy(update={"audit": "off"})})


def made_losses(
    lossy: RoutingSpec, losses: Sequence[float], prompts: Sequence[str], max_new_tokens: int
) -> CertifiedLosses:
    """Losses of a policy, as if it had been decoded with on a CPU."""
    return CertifiedLosses(
        policy=policy_parts(lossy),
        dtype=lossy.verifier.dtype,
        backend="cpu torch",
        loss="token_divergence",
        max_new_tokens=max_new_tokens,
        rounding_gap=0.01,
        prompts=list(prompts),
        losses=list(losses),
        tokens=list(range(1, len(losses) + 1)),
    )


def write_losses(losses: CertifiedLosses, path: Path, name: str) -> HashedFile:
    """Write losses beside the spec at ``path``, and say how it names them."""
    target = path.parent / "certificate" / name
    write_json(target, losses)
    return HashedFile(path=f"certificate/{name}", sha256=file_sha256(target))
