"""What a spec says of its gates: the features they look at, their weights, and the bounds of their scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from viasd_calib.schema.base import Share, SpecModel


class LogisticGate(SpecModel):
    """P(q's choice = this token) = sigmoid(weight . (x - mean) / scale + bias) over named features."""

    features: list[str] = Field(min_length=1)
    mean: list[float]
    scale: list[float]
    weight: list[float]
    bias: float
    expected_calibration_error: Share | None = None

    @model_validator(mode="after")
    def _same_length(self) -> LogisticGate:
        if not len(self.features) == len(self.mean) == len(self.scale) == len(self.weight):
            raise ValueError("features, mean, scale and weight must be of one length")
        if any(value <= 0 for value in self.scale):
            raise ValueError("scale must be positive")
        return self


class Gates(SpecModel):
    """Gates and the bounds their scores are held against.

    Under ``calibrated`` a score is the gate's probability. Under ``ratio`` it is the published
    r = q'(v) / max q' (arXiv 2606.12243): accept at r >= ``accept_at``, escalate at r < ``escalate_below``,
    regenerate between. A bound above 1 is never met; where both bounds of the slim tier are, q' is not run.
    Drafting stops behind the token up to which the chance that the block stands, the product of the draft gate's
    scores, falls below ``draft_stop_below``.
    """

    convention: Literal["calibrated", "ratio"] = "calibrated"
    draft: LogisticGate | None = None
    slim: LogisticGate | None = None
    draft_stop_below: float = Field(0.0, ge=0, le=1)
    draft_accept_at: float = Field(1.01, gt=0)
    accept_at: float = Field(gt=0)
    regenerate_at: float | None = None
    escalate_below: float | None = None

    @model_validator(mode="after")
    def _fits_convention(self) -> Gates:
        if self.convention == "calibrated":
            if self.slim is None or self.regenerate_at is None or self.escalate_below is not None:
                raise ValueError("the calibrated convention needs a slim gate and regenerate_at, and no escalate_below")
        elif self.escalate_below is None or self.regenerate_at is not None:
            raise ValueError("the ratio convention needs escalate_below, and no regenerate_at")
        elif self.accept_at <= self.escalate_below:
            raise ValueError("accept_at must exceed escalate_below, or the regenerate band is empty")
        if self.draft is None and (self.draft_stop_below > 0 or self.draft_accept_at <= 1):
            raise ValueError("draft_stop_below and draft_accept_at need a draft gate")
        return self

    @property
    def slim_tier(self) -> bool:
        """Whether q' may decide anything.

        Example:
            >>> Gates(convention="ratio", accept_at=1.01, escalate_below=0.5).slim_tier  # it may regenerate
            True
        """
        own = self.escalate_below if self.regenerate_at is None else self.regenerate_at
        return self.accept_at <= 1 or (own is not None and own <= 1)
