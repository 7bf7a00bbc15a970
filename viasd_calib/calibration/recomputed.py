"""A spec's certificate, computed anew from the losses beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from viasd_calib.binding import misfits, read_losses, with_candidate
from viasd_calib.calibration.betting import betting_p_value
from viasd_calib.calibration.risk import PROCEDURE
from viasd_calib.errors import SpecError
from viasd_calib.schema.certified_losses import CertifiedLosses
from viasd_calib.spec import Certificate, RoutingSpec

ROUNDING = 1e-6
"""Numbers that another machine computed may differ by this share."""
AGAIN = "calibrate and export again"


def certificate_problems(spec: RoutingSpec, folder: Path) -> list[str]:
    """Why a spec's certificate does not hold for it, or for one of the candidates that it lists, a line each.

    Digests, observed losses and p-values are computed anew from the spec and the files of losses in ``folder``.
    """
    certificate = spec.certificate
    if certificate is None:
        return []
    problems = _problems(spec, folder)
    listed = [one.digest for one in certificate.candidates or ()]
    if certificate.bound is not None and listed and certificate.digest not in listed:
        problems.append(f"the certificate's own policy is none of the candidates that it lists; {AGAIN}")
    return [*problems, *candidate_problems(spec, folder)]


def candidate_problems(spec: RoutingSpec, folder: Path) -> list[str]:
    """Why certified candidates that a spec lists do not hold, a line each, which names the candidate."""
    listed = [] if spec.certificate is None else spec.certificate.candidates or []
    return [
        f"{candidate.name}: {problem}"
        for candidate in listed
        for problem in _problems(with_candidate(spec, candidate), folder)
    ]


def _problems(spec: RoutingSpec, folder: Path) -> list[str]:
    """The same of the spec's own policy; none for a certificate without a bound."""
    certificate = spec.certificate
    if certificate is None or certificate.bound is None:
        return []
    try:
        losses = read_losses(certificate, folder)
    except SpecError as error:
        return [f"the bound of {certificate.bound:g} does not hold for this spec: {error}; {AGAIN}"]
    differing = misfits(spec, losses)
    problems = [f"the certificate was made for something else: {', '.join(differing)}; {AGAIN}"] if differing else []
    return [*problems, *(f"{problem}; {AGAIN}" for problem in _numbers(spec, certificate, losses))]


def _numbers(spec: RoutingSpec, certificate: Certificate, losses: CertifiedLosses) -> Iterator[str]:
    """What the losses come to otherwise than the certificate says."""
    if certificate.procedure != PROCEDURE:
        yield f"the procedure {certificate.procedure!r} is not that of this release, {PROCEDURE!r}"
        return
    bound = certificate.bound
    assert bound is not None, "looked at by the caller"
    p_value = betting_p_value(losses.losses, bound)
    for name, said, found in (
        ("observed loss", certificate.observed, losses.observed),
        ("observed loss by token", certificate.observed_by_token, losses.observed_by_token),
        ("p-value", certificate.p_value, p_value),
    ):
        if said is None or not math.isclose(said, found, rel_tol=ROUNDING, abs_tol=1e-12):
            yield f"the {name} is {found:.6g} by the losses, and the certificate says {said}"
    if p_value > certificate.level * (1 + ROUNDING):
        yield f"a p-value of {p_value:.3g} shows nothing at the level {certificate.level:g}"
    if len(losses.prompts) > certificate.n_prompts:
        yield f"there are {len(losses.prompts)} losses, and the certificate is of {certificate.n_prompts} prompts"
    known = None if spec.prompts is None else spec.prompts.calibrate
    if known is not None and losses.prompts != sorted(known)[: len(losses.prompts)]:
        yield "the losses are not of the spec's calibrate prompts, the first ones in the order of their hashes"
