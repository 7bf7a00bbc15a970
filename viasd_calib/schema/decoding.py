"""Settings of the decoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from viasd_calib.schema.base import Audit, SpecModel

PolicyDrafter = Literal["lookup", "slim", "none"]
"""What drafts in the place of a draft model."""


class Decoding(SpecModel):
    """Settings of the decoder."""

    audit: Audit = Field(
        "strict",
        description="of pending tokens: strict keeps q's own, tolerant those with q(x) / max q >= tolerance, off all",
    )
    tolerance: float = Field(0.5, gt=0, le=1, description="of audit tolerant")
    draft_length: int = Field(6, ge=0, le=64, description="most tokens drafted a round")
    drafter: PolicyDrafter | None = Field(
        None,
        description="what three-tier decoding drafts with in the draft model's place: lookup, what followed the same "
        "n-gram earlier in the text; slim, nothing, the slim verifier writes token by token; none, nothing, the full "
        "verifier writes token by token; null for the draft model",
    )
    max_pending: int = Field(12, ge=0, le=256, description="most tokens that may wait for the full verifier")
    drafting_pays_at: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="share of a text's drafted tokens that must be kept for drafting to pay; while fewer are, at most "
        "one token is drafted a round, and then none for some rounds; null for whole blocks always",
    )
    temperature_scope: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [0.0],
        min_length=1,
        description="sampling temperatures that the certificate holds for; 0 is greedy",
    )

    @field_validator("temperature_scope")
    @classmethod
    def _once_each(cls, temperatures: list[float]) -> list[float]:
        if len(set(temperatures)) < len(temperatures):
            raise ValueError("temperatures must be given once each")
        return temperatures
