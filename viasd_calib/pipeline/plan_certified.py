"""Certified candidates of a spec, among which a plan may choose one on this machine: no new certificate is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viasd_calib.errors import PlanningError
from viasd_calib.pipeline import lazy_types
from viasd_calib.spec import CertifiedCandidate, DType, OffloadRef, RoutingSpec


def listed_candidates(path: str, spec: RoutingSpec, dtype: DType | None) -> list[CertifiedCandidate]:
    """The candidates that a spec lists, all of which hold for it, before a model is loaded.

    Args:
        path: of the spec, beside which the losses lie.
        dtype: number format in place of the spec's.

    Raises:
        PlanningError: there are none, one of them does not hold, or they are certified for another number format.
    """
    from viasd_calib.binding import misfits_here
    from viasd_calib.calibration.recomputed import candidate_problems

    found = [] if spec.certificate is None else spec.certificate.candidates or []
    if not found:
        raise PlanningError(
            f"{path} lists no certified candidates to choose among: nothing was certified, or it was exported by an "
            "earlier release; calibrate and export it again, or leave out --certified"
        )
    problems = candidate_problems(spec, Path(path).parent)
    if problems:
        raise PlanningError(f"not all certified candidates of {path} hold (see viasd validate): {problems[0]}")
    for candidate in found:
        _refuse(misfits_here(candidate, dtype or spec.verifier.dtype, candidate.backend))
    return found


def refuse_other_than_certified(
    engine: lazy_types.Engine, spec: RoutingSpec, folder: Path, candidates: Sequence[CertifiedCandidate]
) -> None:
    """Refuse models, a number format or kernels that the candidates are not certified for.

    Args:
        engine: that is about to decode.
        spec: as it was read; the engine's own is without what does not hold here.
        folder: of the spec.

    Raises:
        PlanningError: naming what differs.
    """
    from viasd_calib.binding import misfits_here
    from viasd_calib.draft.build import draft_weights
    from viasd_calib.models import DTYPE_NAMES
    from viasd_calib.slim.backends import kernel_family
    from viasd_calib.spec import other_weights

    _refuse(other_weights(spec, engine.verifier.ref, draft_weights(engine.spec.draft, folder)))
    dtype = DTYPE_NAMES[engine.routed.dtype]
    backend = kernel_family(engine.backend, engine.routed.device)
    for candidate in candidates:
        _refuse(misfits_here(candidate, dtype, backend))


def _refuse(differing: Sequence[str]) -> None:
    if differing:
        raise PlanningError(
            f"the spec's certified candidates do not hold here, these differ from what was certified: "
            f"{', '.join(differing)}; give what they were certified with (--dtype, --device, --backend, --verifier, "
            "--draft-model), leave out --certified, or calibrate here"
        )


def candidate_decoders(engine: lazy_types.Engine, candidates: Sequence[CertifiedCandidate]) -> list[lazy_types.Decoder]:
    """A decoder for each candidate, with the audit that it is certified with."""
    from viasd_calib.pipeline.fitted import decoder_at

    return [decoder_at(engine, one.bounds.applied_to(engine.spec.gates), one.decoding) for one in candidates]


def with_certified(spec: RoutingSpec, candidate: CertifiedCandidate, offload: OffloadRef | None) -> RoutingSpec:
    """The spec that decodes by one of its candidates, whose certificate is in force.

    Args:
        offload: how layers were read when it was decoded.

    Raises:
        PlanningError: it would be another policy than the one that is certified.
    """
    from viasd_calib.binding import with_candidate
    from viasd_calib.digest import policy_digest

    found = RoutingSpec(**{**dict(with_candidate(spec, candidate)), "offload": offload})
    if policy_digest(found) != candidate.digest:
        raise PlanningError(f"{candidate.name} is not of this spec's policy; see viasd validate")
    return found


def certified_words(
    certificate_tokens: int, candidates: Sequence[CertifiedCandidate], decision: lazy_types.Decision
) -> list[str]:
    """What the candidates took beside exact decoding, and whether one of them is taken, in words.

    Args:
        certificate_tokens: longest answer that they are certified for, in tokens a turn.
        decision: with a timing for each candidate.
    """
    words = [
        f"Certified {one.name}: {1000 * took.seconds_per_token:.2f} ms a token where it was decoded, exact decoding "
        f"{1000 * decision.exact:.2f}; {took.speed.words} times its speed on {took.speed.n} prompts."
        for one, took in zip(candidates, decision.candidates, strict=True)
    ]
    number = decision.fastest_candidate
    if number is None:
        from viasd_calib.calibration.policy_timing import LOSSY_GAIN

        why = (
            "none is shown to be faster than exact decoding"
            if decision.certified_speed is None or not decision.certified_speed.above_one
            else f"the fastest saves less than {100 * LOSSY_GAIN:.0f} % of the time of exact decoding"
        )
        return [*words, f"No certified candidate: {why}, so that the spec decodes exactly, by the plan."]
    one = candidates[number]
    return [
        *words,
        f"The spec decodes by {one.name} with audit {one.decoding.audit}, without a plan: a loss of {one.bound:g} at "
        f"most is certified, in answers of up to {certificate_tokens} tokens.",
    ]
