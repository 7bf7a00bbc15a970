"""What fit and calibrate write for the next step: small JSON files beside safetensors."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from viasd_calib.calibration.candidates import TierScores
from viasd_calib.calibration.certify import TestedCandidate
from viasd_calib.calibration.floor import Floor
from viasd_calib.calibration.policy_timing import PolicyTiming
from viasd_calib.calibration.reliability import Reliability
from viasd_calib.errors import CalibrationError, SpecError
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE, SCORES_FILE
from viasd_calib.files import read_json, write_bytes
from viasd_calib.schema.certified_losses import CertifiedLosses
from viasd_calib.spec import (
    Audit,
    Certificate,
    CertifiedCandidate,
    CertifiedPolicy,
    DType,
    Gates,
    HashedFile,
    LogisticGate,
    OffloadRef,
    PolicyDrafter,
    Route,
    VerifierRef,
)


class FitArtifact(BaseModel):
    """What ``viasd fit`` found.

    Attributes:
        draft: the drafter's name; a relative path leads there from the fit's folder.
        agreement: of q' with q on held-back texts, argmax against argmax, q's cache.
        outside_head_vocab: share of their generated places at which q's choice is no output token of q': what the
            reduced head costs of that agreement at most; 0 with the whole head.
        fit_sha256: hash of the set of prompts learned from.
        prompts: short hashes of their texts (:mod:`viasd_calib.prompt_copies`); None in what earlier releases wrote.
        offload: how it is to decode, where bits were chosen by memory; None for all in memory.
    """

    model_config = ConfigDict(extra="forbid")

    verifier: VerifierRef
    draft: str
    route: Route
    draft_gate: LogisticGate
    slim_gate: LogisticGate
    reliability: dict[str, Reliability]
    agreement: float
    outside_head_vocab: float = 0.0
    fit_sha256: str
    prompts: list[str] | None = None
    offload: OffloadRef | None = None


class SpecPolicy(NamedTuple):
    """What decides how a spec decodes, and how far it may diverge.

    Attributes:
        max_pending: most tokens that may wait for q.
        drafter: what drafts in the draft model's place; None for the draft model.
    """

    audit: Audit
    gates: Gates
    certificate: Certificate
    max_pending: int
    drafter: PolicyDrafter | None = None


class CalibratedCandidate(CertifiedPolicy):
    """A candidate that was certified, with the losses that show it."""

    losses: CertifiedLosses

    def listed(self, losses: HashedFile) -> CertifiedCandidate:
        """The candidate as the certificate of a spec lists it, with its losses in a file of their own."""
        return CertifiedCandidate(**{**dict(self), "losses": losses})


class CalibrateArtifact(BaseModel):
    """What ``viasd calibrate`` came to.

    Attributes:
        fit: folder of the fit, as it lies from the folder of this file; earlier releases wrote it as it lay from where
            the command was run.
        verifier: what it was certified on; None in what earlier releases wrote.
        dtype: number format that was decoded in; None in what earlier releases wrote.
        gates: those of the fastest exact policy: without a slim tier that does not pay.
        max_pending: as many as were asked for; an exact policy may have found fewer to be faster (``slim_worth``).
        certified_gates: those the certificate holds for; None where nothing is certified.
        certificate: of the certified policy, or of why there is none.
        slim_worth: how fast these policies are.
        offload: which layers were read for each pass then.
        losses: of the certified policy's prompts, and what these were decoded with; None where nothing is certified,
            and in what earlier releases wrote.
        candidates: all that are certified, most careful first, ``certified_gates`` last; None where nothing is, and in
            what earlier releases wrote.
        floor: what rounding came to; None in what earlier releases wrote.
        prompts: short hashes of the texts that were decoded; None in what earlier releases wrote.
    """

    model_config = ConfigDict(extra="forbid")

    fit: str
    verifier: VerifierRef | None = None
    dtype: DType | None = None
    gates: Gates
    certified_gates: Gates | None
    draft_length: int
    max_pending: int
    certificate: Certificate
    slim_worth: PolicyTiming
    offload: OffloadRef | None = None
    losses: CertifiedLosses | None = None
    candidates: list[CalibratedCandidate] | None = None
    floor: Floor | None = None
    tested: list[TestedCandidate]
    prompts: list[str] | None = None

    def policy(self, audit: Audit | None = None) -> SpecPolicy:
        """What a spec with this audit consists of; without one, the fastest policy.

        Raises:
            SpecError: an ``audit`` that nothing certifies.
        """
        audit = audit or ("off" if self.slim_worth.lossy_pays else "strict")
        if audit == "strict":
            found = self.slim_worth.exact_policy.policy
            bound = found.max_pending if found.slim_tier else self.max_pending
            return SpecPolicy(audit, self.gates, self._exact_certificate(), bound, found.drafter)
        if self.certified_gates is None:
            raise SpecError(
                f"nothing is certified, so no spec can be exported with audit {audit}; "
                "leave out --audit, or calibrate with more prompts or a larger --max_loss"
            )
        return SpecPolicy(audit, self.certified_gates, self.certificate, self.max_pending)

    def _exact_certificate(self) -> Certificate:
        """The certificate beside gates of an exact policy: it bounds nothing that they would do without the audit."""
        found, timing = self.certificate, self.slim_worth
        if found.bound is None or timing.decision.certified is None:
            return found
        note = (
            f"exact: never diverges. A policy with a {found.loss} of at most {found.bound} is certified too "
            f"(observed {found.observed:.4f}) and took {1000 * timing.decision.certified:.1f} ms a token, "
            f"this one {1000 * timing.seconds_per_token_exact:.1f}; viasd export --audit off writes it"
        )
        return found.without_bound(note)


def save_scores(scores: TierScores, folder: Path) -> None:
    """Write the held-back scores of a fit, atomically."""
    tensors = {field.name: getattr(scores, field.name).contiguous() for field in fields(TierScores)}
    write_bytes(folder / SCORES_FILE, save(tensors))


def load_scores(folder: Path) -> TierScores:
    """Read the held-back scores of a fit.

    Raises:
        CalibrationError: missing or damaged.
    """
    try:
        return TierScores(**load_file(folder / SCORES_FILE))
    except (OSError, SafetensorError, TypeError) as error:
        raise CalibrationError(f"{folder / SCORES_FILE} is missing or damaged; run viasd fit again") from error


def fit_beside(fit: Path, folder: Path) -> str:
    """How a calibrate result in ``folder`` names the fit that it was made of."""
    return Path(os.path.relpath(fit.resolve(), folder.resolve())).as_posix()


def load_fit_of(calibrated: CalibrateArtifact, folder: Path, given: str | None = None) -> tuple[FitArtifact, Path]:
    """The fit that a calibrate result was made of, and the folder it lies in.

    Args:
        folder: of the calibrate result.
        given: where the user says that the fit is; None for where the result says.

    Raises:
        CalibrationError: there is no fit, or it is another one.
    """
    places = [Path(given)] if given is not None else [folder / calibrated.fit, Path(calibrated.fit)]
    place = next((place for place in places if (place / FIT_FILE).is_file()), None)
    if place is None:
        raise CalibrationError(
            f"{folder / CALIBRATE_FILE} was made of a fit that is not at {places[0]}; "
            "put it back there, or say with --fit where it is"
        )
    fitted = read_json(FitArtifact, place / FIT_FILE, "viasd fit")
    if (fitted.draft_gate, fitted.slim_gate) != (calibrated.gates.draft, calibrated.gates.slim):
        raise CalibrationError(
            f"{place} holds another fit than the one {folder / CALIBRATE_FILE} was made of; "
            "say with --fit where that is, or calibrate again"
        )
    return fitted, place
