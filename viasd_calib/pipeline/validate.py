"""Whether a routing spec holds: its schema, its version, its tensors, its certificate, and its verifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viasd_calib.errors import SpecError
from viasd_calib.pipeline.checks import check_model
from viasd_calib.shipped import shipped
from viasd_calib.spec import RoutingSpec, VerifierRef, check_verifier, load_spec, spec_problems


def validate(spec: str, verifier: str | None = None) -> RoutingSpec:
    """Check a routing spec: its schema, its version, its tensors, its certificate, and the verifier if one is named.

    Of a certificate with a bound, the policy's digest and the p-value are computed anew, from the spec and the losses
    beside it.

    Args:
        spec: path of the spec.
        verifier: load this verifier too, and check that the spec was made for it.

    Raises:
        ModelError: the verifier is a path at which there is none.
        SpecError: listing every problem, one a line.
    """
    check_model(verifier)
    spec = shipped(spec)
    problems = spec_problems(spec)
    if problems:
        raise SpecError(_listed(spec, problems))
    from viasd_calib.calibration.recomputed import certificate_problems
    from viasd_calib.draft.checking import drafter_misfits
    from viasd_calib.slim.checking import tensor_misfits

    checked = load_spec(spec)
    folder = Path(spec).parent
    problems = tensor_misfits(checked, folder) + drafter_misfits(checked, folder)
    problems += certificate_problems(checked, folder)
    if verifier is not None:
        from viasd_calib.models import load_verifier

        problems += verifier_misfits(checked, load_verifier(verifier).ref)
    if problems:
        raise SpecError(_listed(spec, problems))
    return checked


def verifier_misfits(spec: RoutingSpec, verifier: VerifierRef) -> list[str]:
    """Why a spec does not hold for a verifier as it is: of another shape, or with other weights."""
    try:
        check_verifier(spec, verifier)
    except SpecError as error:
        return [str(error)]
    weights = spec.verifier.weights, verifier.weights
    if None in weights or weights[0] == weights[1]:
        return []
    return [
        f"the weights of {verifier.name_or_path} are not those the spec was made for: it decodes exactly with them, "
        "and certifies nothing; load those weights, or calibrate with these"
    ]


def _listed(spec: str, problems: Sequence[str]) -> str:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return "\n".join([f"{spec} is not valid, {count}:", *(f"  {problem}" for problem in problems)])
