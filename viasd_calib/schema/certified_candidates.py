"""The candidates that were certified together: those among which a plan on another machine may choose."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from viasd_calib.schema.base import DType, HashedFile, Sha256, Share, SpecModel
from viasd_calib.schema.decoding import Decoding
from viasd_calib.schema.gates import Gates


class GateBounds(SpecModel):
    """The bounds of calibrated gates, in which candidates differ; the gates themselves are those of the spec."""

    draft_stop_below: float = Field(ge=0, le=1, description="as gates.draft_stop_below")
    speculative_stop_below: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="as gates.speculative_stop_below"
    )
    draft_accept_at: float = Field(gt=0, description="as gates.draft_accept_at; above 1 for never")
    accept_at: float = Field(gt=0, description="as gates.accept_at; above 1 for never")
    regenerate_at: float = Field(gt=0, description="as gates.regenerate_at; above 1 for never")

    @classmethod
    def of(cls, gates: Gates) -> GateBounds:
        """The bounds of calibrated gates.

        Raises:
            ValidationError: gates of another convention, which have no ``regenerate_at``.
        """
        return cls.model_validate({name: getattr(gates, name) for name in cls.model_fields})

    def applied_to(self, gates: Gates) -> Gates:
        """The same gates at these bounds."""
        return gates.model_copy(update=dict(self))


class CertifiedPolicy(SpecModel):
    """What was shown of one policy: a candidate that passed the test."""

    bounds: GateBounds = Field(description="of its gates, in place of those in gates")
    decoding: Decoding = Field(description="settings that it was decoded with, in place of those in decoding")
    digest: Sha256 = Field(description="of the policy that verifier, draft, route, gates, bounds and decoding make")
    bound: float = Field(gt=0, lt=1, description="as certificate.bound")
    observed: Share = Field(description="as certificate.observed")
    observed_by_token: Share = Field(description="as certificate.observed_by_token")
    p_value: Share = Field(description="as certificate.p_value")
    dtype: DType = Field(description="number format that was decoded in")
    backend: str = Field(min_length=1, description="device and family of kernels that decoded, as cpu torch")

    @property
    def name(self) -> str:
        """What tells it from other candidates of a certificate, in words."""
        return f"candidate {self.digest[:12]} (accept_at {self.bounds.accept_at:g})"


class CertifiedCandidate(CertifiedPolicy):
    """A candidate that was certified, and where its losses lie.

    All candidates of a certificate hold together with its confidence, so that any of them may be taken without another
    test. What they have in common, as loss, confidence and prompts, is in the certificate.
    """

    losses: HashedFile = Field(description="the prompts' losses, a JSON file beside the spec")
