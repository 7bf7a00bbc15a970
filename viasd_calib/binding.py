"""What a certificate is bound to: one policy, in one number format, on one family of kernels, for texts of one length.

A certificate holds for what was decoded with when it was made. It names the digest of that policy, and the file with
its prompts' losses says the rest. Where the spec says otherwise by now, or something else is about to decode, it holds
no more, and the spec decodes exactly. That detects edits and mix-ups; it is no signature.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from pydantic import ValidationError

from viasd_calib.digest import policy_digest, policy_parts
from viasd_calib.errors import CertificateWarning, SpecError
from viasd_calib.schema.certified_losses import POLICY_PARTS, CertifiedLosses
from viasd_calib.spec import Certificate, CertifiedCandidate, DType, RoutingSpec, first_problem, void_certificate


def read_losses(certificate: Certificate, folder: Path) -> CertifiedLosses:
    """The losses that a certificate in ``folder`` was made from.

    Raises:
        SpecError: it names none, as those of earlier releases; or they are missing, damaged or others.
    """
    if certificate.losses is None or certificate.digest is None:
        raise SpecError("the certificate does not say which policy it holds for, as those of earlier releases do not")
    path = folder / certificate.losses.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}, the certificate's losses, cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != certificate.losses.sha256:
        raise SpecError(f"{path} is not the file of losses that the certificate was written with (SHA-256 differs)")
    try:
        return CertifiedLosses.model_validate_json(content)
    except ValidationError as error:
        raise SpecError(f"{path} holds no losses of a certificate: {first_problem(error)}") from error


def misfits(spec: RoutingSpec, losses: CertifiedLosses) -> list[str]:
    """What a spec says otherwise than the losses its certificate was made from; nothing for one as it was exported.

    Each is a part of the policy, as "gates", or an entry of the certificate with both values.
    """
    certificate = spec.certificate
    if certificate is None:
        return []
    now = policy_parts(spec)
    found = [f"{part} (edited, or of another policy)" for part in POLICY_PARTS if now[part] != losses.policy.get(part)]
    if not found and certificate.digest != policy_digest(spec):
        found.append("the policy's digest")
    for name in ("dtype", "backend", "loss", "max_new_tokens", "rounding_gap"):
        said, was = getattr(certificate, name), getattr(losses, name)
        if said != was:
            found.append(f"certificate.{name} ({said}, certified {was})")
    return found


def with_candidate(spec: RoutingSpec, candidate: CertifiedCandidate) -> RoutingSpec:
    """The spec decoding by one of its certified candidates, with that one's certificate in force, and without a plan.

    What was measured of another policy (evidence) is left out.

    Raises:
        SpecError: it has no certificate that could list one.
    """
    if spec.certificate is None:
        raise SpecError("the spec has no certificate, so no certified candidates; calibrate and export it again")
    changes = {
        "gates": candidate.bounds.applied_to(spec.gates),
        "decoding": candidate.decoding,
        "certificate": spec.certificate.of_candidate(candidate),
        "plan": None,
        "evidence": None,
    }
    return spec.model_copy(update=changes)


def misfits_here(certified: CertifiedLosses | CertifiedCandidate, dtype: DType, backend: str) -> list[str]:
    """What is about to decode otherwise than what was certified.

    Args:
        certified: names number format and kernels that it was certified with.
        dtype: number format that is about to decode.
        backend: family of the kernels that are (:func:`viasd_calib.slim.backends.kernel_family`).
    """
    return [
        f"{what} ({now} here, certified {was})"
        for what, now, was in (
            ("the number format", dtype, certified.dtype),
            ("the kernels", backend, certified.backend),
        )
        if now != was
    ]


def check_certificate(spec: RoutingSpec, folder: Path, dtype: DType, backend: str) -> RoutingSpec:
    """The spec as it may decode here: exactly, with a warning, where its certificate holds for something else.

    Args:
        folder: of the spec.
        dtype: number format that is about to decode.
        backend: family of the kernels that are (:func:`viasd_calib.slim.backends.kernel_family`).
    """
    if spec.certificate is None or spec.certificate.bound is None:
        return spec
    try:
        losses = read_losses(spec.certificate, folder)
    except SpecError as error:
        return _void(spec, str(error))
    found = misfits(spec, losses) + misfits_here(losses, dtype, backend)
    return _void(spec, f"these differ from what was certified: {', '.join(found)}") if found else spec


def _void(spec: RoutingSpec, why: str) -> RoutingSpec:
    warnings.warn(
        f"{why}: the certificate is void, and texts are decoded with audit strict; calibrate and export again for a "
        "certificate of this policy",
        CertificateWarning,
        stacklevel=4,
    )
    return void_certificate(spec, why)
