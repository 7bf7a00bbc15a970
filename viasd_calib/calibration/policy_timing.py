"""Whether the slim tier earns its passes, a draft model its steps and a certified loss its time: what was timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from viasd_calib.calibration.paired import Interval
from viasd_calib.decoding.policies import Policy, PolicyKind
from viasd_calib.spec import PolicyDrafter

DRAFTED_BY: dict[PolicyDrafter, str] = {
    "slim": "the slim verifier writes token by token",
    "lookup": "lookup drafts",
    "none": "nothing is drafted, and q' is not asked",
}

CLOSE = 0.1
"""Share of a decoded speed-up by which a replay's may be off to be called close."""

LOSSY_GAIN = 0.05
"""Share of its time that a certified policy must save to be exported unasked: its text may diverge."""


class TimedPolicy(BaseModel):
    """A policy of exact decoding that was decoded.

    Attributes:
        predicted: seconds a token by the replay, *simulated*.
        seconds_per_token: on the prompts of the timing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Policy
    predicted: float = Field(gt=0)
    seconds_per_token: float = Field(gt=0)


class SpeedUp(NamedTuple):
    """Of a policy over no drafting.

    Attributes:
        predicted: by the replay, *simulated*.
        measured: where it was decoded.
    """

    policy: Policy
    predicted: float
    measured: float

    @property
    def deviation(self) -> float:
        """By what share of what was decoded the prediction lies above it.

        Example:
            >>> SpeedUp(Policy(), predicted=4.5, measured=5.0).deviation
            -0.1
        """
        return round(self.predicted / self.measured - 1, 12)  # of two shares that are equal it is 0, rounding or not


class TimedCertified(BaseModel):
    """A certified policy that was decoded beside exact ones.

    Attributes:
        speed: over that of the exact policy that is exported, paired by prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds_per_token: float = Field(gt=0)
    speed: Interval


class Decision(BaseModel):
    """How the fastest exact policies with the slim tier and without it compare, and the certified one with them, on
    prompts on which nothing was searched wherever there are enough of them.

    Attributes:
        with_slim: seconds a token of exact decoding with the slim tier.
        without_slim: of the fastest exact decoding without it.
        without_drafter: what drafts there in the draft model's place; None for the draft model.
        baselines: seconds a token of every policy without the slim tier, by its kind.
        certified: of the certified policy, whose text may diverge; None where there is none. Of several, the fastest
            that is shown to be faster than exact decoding, or of all where none is.
        slim_speed: speed with the slim tier over that without, paired by prompt. Its bounds hold at every look that
            may have ended the timing, all together at 95 %.
        certified_speed: of the certified policy over the exact one that is exported.
        candidates: all certified policies that were decoded; not in what earlier releases wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    with_slim: float = Field(gt=0)
    without_slim: float = Field(gt=0)
    without_drafter: PolicyDrafter | None = None
    baselines: dict[PolicyKind, float] = Field(default_factory=dict)
    certified: float | None = Field(None, gt=0)
    slim_speed: Interval
    certified_speed: Interval | None = None
    candidates: tuple[TimedCertified, ...] = ()

    @model_validator(mode="after")
    def _both_of_the_certified(self) -> Self:
        if (self.certified is None) != (self.certified_speed is None):
            raise ValueError("certified and certified_speed are given together, or neither")
        return self

    @property
    def exact(self) -> float:
        """Seconds a token of the exact policy that is exported: with the slim tier where that is shown to pay."""
        return self.with_slim if self.slim_speed.above_one else self.without_slim

    @property
    def lossy_pays(self) -> bool:
        """Whether there is a certified policy that is shown to be faster than the exact one, and by ``LOSSY_GAIN``."""
        if self.certified is None or self.certified_speed is None or not self.certified_speed.above_one:
            return False
        return self.certified < (1 - LOSSY_GAIN) * self.exact

    @property
    def fastest_candidate(self) -> int | None:
        """Which of ``candidates`` is faster than exact decoding, and the fastest of these; None where none is."""
        if not self.lossy_pays:
            return None
        return next(number for number, one in enumerate(self.candidates) if one.seconds_per_token == self.certified)


class PolicyTiming(BaseModel):
    """What policies took side by side, and which one is to be exported.

    Attributes:
        n_prompts: on which ``policies`` took turns.
        policies: those that a replay proposed, in order.
        decision: between the fastest of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_prompts: int = Field(ge=1)
    policies: tuple[TimedPolicy, ...] = Field(min_length=1)
    decision: Decision

    @property
    def exact_policy(self) -> TimedPolicy:
        """The policy of exact decoding to export: the fastest with the slim tier where that pays, else without."""
        return self.fastest_with_slim if self.pays else self.fastest_without_slim

    def fastest_drafted(self, *, by_model: bool) -> TimedPolicy | None:
        """The fastest exact policy that drafts with the draft model, or without one; None where none was tried."""
        found = [one for one in self.policies if (one.policy.drafter is None) == by_model]
        return _fastest(found) if found else None

    def drafter_words(self) -> str | None:
        """Whether exact decoding pays without a draft model; None where it was not tried, or on too few prompts."""
        with_model, without = self.fastest_drafted(by_model=True), self.fastest_drafted(by_model=False)
        if not self.enough or with_model is None or without is None or without.policy.drafter is None:
            return None
        times = (
            f"a token took {1000 * without.seconds_per_token:.1f} ms without "
            f"({DRAFTED_BY[without.policy.drafter]}) and {1000 * with_model.seconds_per_token:.1f} ms with it"
        )
        if self.exact_policy.policy.drafter is None:
            return f"The draft model pays: {times}."
        return f"No draft model is the fastest: {times}."

    @property
    def fastest_with_slim(self) -> TimedPolicy:
        """The fastest policy that asks q', whether it pays or not."""
        return _fastest([one for one in self.policies if one.policy.slim_tier])

    @property
    def fastest_without_slim(self) -> TimedPolicy:
        """The policy that does not ask q' and was the fastest where that was decided."""
        drafter = self.decision.without_drafter
        return _fastest([one for one in self._without_slim() if one.policy.drafter == drafter])

    @property
    def speculative_stop(self) -> float:
        """The fastest stop bound of speculative decoding."""
        return _fastest([one for one in self._without_slim() if one.policy.drafter is None]).policy.stop_below

    def speedup(self, one: TimedPolicy) -> tuple[float, float] | None:
        """Of a policy over no drafting, predicted and measured; None where that was not decoded.

        Passes that all take longer than when they were priced are so no error of the replay.
        """
        plain = next((one for one in self.policies if one.policy.kind == "no drafting"), None)
        if plain is None:
            return None
        return plain.predicted / one.predicted, plain.seconds_per_token / one.seconds_per_token

    def speedups(self) -> list[SpeedUp]:
        """Of each policy over no drafting, which is no row itself: there is nothing to predict of it.

        Empty where no drafting was not decoded.
        """
        drafted = [one for one in self.policies if one.policy.kind != "no drafting"]
        return [SpeedUp(one.policy, *found) for one in drafted if (found := self.speedup(one)) is not None]

    def prediction_words(self) -> str | None:
        """How far the replay was off at most, in a sentence; None where decoding without drafting was not timed."""
        speedups = self.speedups()
        if not speedups:
            return None
        error = max(abs(one.deviation) for one in speedups)
        return (
            f"The replay predicted the speed-up over no drafting of {len(speedups)} policies within {error:.0%} of "
            f"what was decoded on {self.n_prompts} prompts."
        )

    def _without_slim(self) -> list[TimedPolicy]:
        return [one for one in self.policies if not one.policy.slim_tier]

    @property
    def seconds_per_token_exact(self) -> float:
        """Of the exact policy that is exported."""
        return self.decision.exact

    @property
    def pays(self) -> bool:
        """Whether the slim tier is shown to make exact decoding faster: the whole interval of its speed over that
        without lies above 1.
        """
        return self.decision.slim_speed.above_one

    @property
    def enough(self) -> bool:
        """Whether enough prompts were timed to say."""
        return self.decision.slim_speed.bounds is not None

    @property
    def lossy_pays(self) -> bool:
        """Whether the certified policy is exported unasked."""
        return self.decision.lossy_pays


def _fastest(policies: Sequence[TimedPolicy]) -> TimedPolicy:
    """Of equally fast ones the first."""
    return min(policies, key=lambda one: one.seconds_per_token)
