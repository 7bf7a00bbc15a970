"""The gates of a spec: the features they read, their weights, and the thresholds of their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from viasd_calib.schema.base import Share, SpecModel, refuse

DRAFT_FEATURES = (
    "draft_entropy",
    "draft_log_top1",
    "draft_margin",
    "draft_depth",
    "draft_log_odds",
    "draft_certain",
    "draft_certain_depth",
)
"""What a draft gate may look at: known from the draft model alone (:mod:`viasd_calib.decoding.features`)."""
SLIM_FEATURES = (
    "slim_entropy",
    "slim_log_top1",
    "slim_margin",
    "log_ratio",
    "has_draft",
    "same_choice",
    "draft_kl_slim",
    "draft_log_top1",
    "draft_entropy",
    "block_place",
    "pending",
    "slim_log_margin",
    "log_log_ratio",
)
"""What a slim gate may look at: known after a slim pass."""


class LogisticGate(SpecModel):
    """P(q's choice = this token) = sigmoid(weight . (x - mean) / scale + bias) over named features."""

    features: list[str] = Field(min_length=1, description="names of the inputs x, each once")
    mean: list[float] = Field(description="of each feature on the fit texts")
    scale: list[float] = Field(description="standard deviation of each feature on the fit texts; positive")
    weight: list[float] = Field(description="of each standardised feature, (x - mean) / scale")
    bias: float = Field(description="of the sum")
    expected_calibration_error: Share | None = Field(
        None, description="on held-back texts, over 15 bins of equal width; null where not measured"
    )

    @model_validator(mode="after")
    def _can_be(self) -> LogisticGate:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        if not len(self.features) == len(self.mean) == len(self.scale) == len(self.weight):
            yield "features, mean, scale and weight must be of one length"
        if any(value <= 0 for value in self.scale):
            yield "scale must be positive"
        for name, count in Counter(self.features).items():
            if name not in (*DRAFT_FEATURES, *SLIM_FEATURES):
                yield f"there is no feature {name!r}; {_MEND_FEATURES}"
            if count > 1:
                yield f"feature {name!r} is given {count} times, give it once"


_MEND_FEATURES = "fit the gates with this release"


CONVENTIONS: dict[str, tuple[str, ...]] = {
    "calibrated": ("slim", "regenerate_at"),
    "ratio": ("escalate_below",),
}
"""What each convention needs beside ``accept_at``, by its name, which is that of the rule's module in
:mod:`viasd_calib.decoding.slim_rules`: ``slim``, ``regenerate_at`` or ``escalate_below``. A threshold that it does not
need is refused."""

if TYPE_CHECKING:  # the names are those of the mapping
    Convention = str
else:
    Convention = Literal[tuple(CONVENTIONS)]


class Gates(SpecModel):
    """Gates and the thresholds their scores are held against.

    Under ``calibrated`` a score is the gate's probability. Under ``ratio`` it is the published
    r = q'(v) / max q' (arXiv 2606.12243): accept at r >= ``accept_at``, escalate at r < ``escalate_below``,
    regenerate between. A threshold above 1 is never met; where both thresholds of the slim tier are, q' is not run.
    Drafting stops after the token up to which the probability that all are kept, the product of the draft gate's
    scores, falls below ``draft_stop_below``.
    """

    convention: Convention = Field(
        "calibrated", description="what a score is: calibrated, the gate's probability; ratio, q'(v) / max q'"
    )
    draft: LogisticGate | None = Field(
        None, description="gate on what is known from the draft model alone; null for none"
    )
    slim: LogisticGate | None = Field(None, description="gate on what is known after a slim pass; null under ratio")
    draft_stop_below: float = Field(
        0.0,
        ge=0,
        le=1,
        description="drafting stops where the product of the draft gate's scores over the block falls below this",
    )
    speculative_stop_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="the same in speculative decoding, whose passes cost otherwise; null for draft_stop_below",
    )
    draft_accept_at: float = Field(
        1.01,
        gt=0,
        description="least score of the draft gate at which a token is accepted unverified (tier 1); above 1 for never",
    )
    accept_at: float = Field(
        gt=0, description="least score at which the slim tier accepts a drafted token; above 1 for never"
    )
    regenerate_at: float | None = Field(
        None,
        gt=0,
        description="least score at which the slim verifier's token is emitted; above 1 for never; null under ratio",
    )
    escalate_below: float | None = Field(
        None, ge=0, description="ratio below which the full verifier decides (tier 3); null under calibrated"
    )

    @model_validator(mode="after")
    def _can_be(self) -> Gates:
        refuse(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        needed = CONVENTIONS[self.convention]
        barred = [name for name in ("regenerate_at", "escalate_below") if name not in needed]
        given = {name for name, value in self if value is not None}
        if not given.issuperset(needed) or not given.isdisjoint(barred):
            wanted = " and ".join("a slim gate" if name == "slim" else name for name in needed)
            unwanted = " and ".join(f"no {name}" for name in barred)
            yield f"the {self.convention} convention needs {', and '.join(filter(None, (wanted, unwanted)))}"
        elif self.escalate_below is not None and self.accept_at <= self.escalate_below:
            yield "accept_at must exceed escalate_below, or the regenerate band is empty"
        stops = (self.draft_stop_below, self.speculative_stop_below or 0.0)
        if self.draft is None and (max(stops) > 0 or self.draft_accept_at <= 1):
            yield "draft_stop_below, speculative_stop_below and draft_accept_at need a draft gate"
        yield from _unknown_at(self.draft, "draft", DRAFT_FEATURES)
        yield from _unknown_at(self.slim, "slim", SLIM_FEATURES)

    @property
    def speculative_stop(self) -> float:
        """Where drafting stops in speculative decoding."""
        return self.draft_stop_below if self.speculative_stop_below is None else self.speculative_stop_below

    @property
    def slim_tier(self) -> bool:
        """Whether q' may decide anything.

        Example:
            >>> Gates(convention="ratio", accept_at=1.01, escalate_below=0.5).slim_tier  # it may regenerate
            True
        """
        own = self.escalate_below if self.regenerate_at is None else self.regenerate_at
        return self.accept_at <= 1 or (own is not None and own <= 1)


def _unknown_at(gate: LogisticGate | None, tier: str, known: Sequence[str]) -> Iterator[str]:
    """Features that exist, but not yet where this gate is asked."""
    for name in gate.features if gate is not None else ():
        if name not in known:
            yield f"the {tier} gate looks at {name!r}, which is not known where it is asked; {_MEND_FEATURES}"
