"""Whether the slim tier earns its passes, a draft model its steps and a certified loss its time: what was timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from viasd_calib.calibration.paired import Interval
from viasd_calib.decoding.conversation import Answering
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.spec import Audit, Gates, PolicyDrafter

DRAFTED_BY: dict[PolicyDrafter, str] = {
    "slim": "the slim verifier writes token by token",
    "lookup": "lookup drafts",
    "none": "nothing is drafted, and q' is not asked",
}

BASELINES: dict[PolicyDrafter | None, str] = {
    None: "speculative",
    "lookup": "lookup alone",
    "none": "no drafting",
}
"""Policies without the slim tier, by what drafts."""

LOSSY_GAIN = 0.05
"""Share of its time that a certified policy must save to be exported unasked: its text may diverge."""


class Tried(NamedTuple):
    """A policy of exact decoding to try.

    Attributes:
        drafter: what drafts in the draft model's place; None for the draft model.
        max_pending: most tokens that may wait for q; None for as many as are asked for.
    """

    gates: Gates
    drafter: PolicyDrafter | None = None
    max_pending: int | None = None


DecoderFor = Callable[[Tried, Audit], Answering]
"""A decoder of a policy, with an audit."""


class TimedPolicy(BaseModel):
    """A policy of exact decoding that was tried.

    Attributes:
        stage: of the search; seconds are compared within one, whose policies took turns.
        drafter: what drafts in the draft model's place; None for the draft model.
        slim_tier: whether q' is asked.
        threshold: the score at which it is trusted; None where it is not asked.
        draft_accept_at: the score at which the draft gate accepts a token unverified; above 1 it never does.
        draft_stop_below: drafting stops where the whole block is kept with less than this probability.
        max_pending: most tokens that may wait for q; None for as many as were asked for.
        seconds_per_token: on the prompts of the timing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: int = Field(ge=1)
    drafter: PolicyDrafter | None = None
    max_pending: int | None = None
    slim_tier: bool
    threshold: float | None
    draft_accept_at: float
    draft_stop_below: float
    seconds_per_token: float = Field(gt=0)

    @model_validator(mode="after")
    def _threshold_of_the_slim_tier(self) -> Self:
        if self.slim_tier != (self.threshold is not None):
            raise ValueError("a threshold is given where the slim tier is asked, and nowhere else")
        return self

    @classmethod
    def of(cls, tried: Tried, stage: int, seconds_per_token: float) -> TimedPolicy:
        """What was tried, and how long it took."""
        gates = tried.gates
        return cls(
            stage=stage,
            drafter=tried.drafter,
            max_pending=tried.max_pending,
            slim_tier=gates.slim_tier,
            threshold=gates.accept_at if gates.slim_tier else None,
            draft_accept_at=gates.draft_accept_at,
            draft_stop_below=gates.draft_stop_below,
            seconds_per_token=seconds_per_token,
        )

    def applied_to(self, gates: Gates) -> Gates:
        """Calibrated gates with the thresholds of this policy."""
        threshold = NEVER if self.threshold is None else self.threshold
        return with_thresholds(gates, threshold, self.draft_accept_at, self.draft_stop_below)


class Decision(BaseModel):
    """How the fastest exact policies with the slim tier and without it compare, and the certified one with them, on
    prompts on which nothing was searched wherever there are enough of them.

    Attributes:
        with_slim: seconds a token of exact decoding with the slim tier.
        without_slim: of the fastest exact decoding without it.
        without_drafter: what drafts there in the draft model's place; None for the draft model.
        baselines: seconds a token of every policy without the slim tier, by its name in ``BASELINES``; empty in what
            earlier versions wrote, which compared with speculative decoding alone.
        certified: of the certified policy, whose text may diverge; None where there is none.
        slim_speed: speed with the slim tier over that without, paired by prompt. Its bounds hold at every look that
            may have ended the timing, all together at 95 %.
        certified_speed: of the certified policy over the exact one that is exported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    with_slim: float = Field(gt=0)
    without_slim: float = Field(gt=0)
    without_drafter: PolicyDrafter | None = None
    baselines: dict[str, float] = Field(default_factory=dict)
    certified: float | None = Field(None, gt=0)
    slim_speed: Interval
    certified_speed: Interval | None = None

    @model_validator(mode="after")
    def _both_of_the_certified(self) -> Self:
        if (self.certified is None) != (self.certified_speed is None):
            raise ValueError("certified and certified_speed are given together, or neither")
        return self


class PolicyTiming(BaseModel):
    """What policies took side by side, and which one is to be exported.

    Attributes:
        by_bound: seconds a token of exact decoding with the slim tier, by the score at which a tier trusts a token; at
            the stop bound that a replay found, in the first stage of the search.
        n_prompts: of the search.
        policies: all exact ones that were tried, in order.
        decision: between the fastest of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by_bound: dict[float, float] = Field(min_length=1)
    n_prompts: int = Field(ge=1)
    policies: tuple[TimedPolicy, ...] = Field(min_length=1)
    decision: Decision

    @property
    def threshold(self) -> float:
        """The fastest threshold."""
        return min(self.by_bound, key=self.by_bound.__getitem__)

    @property
    def exact_policy(self) -> TimedPolicy:
        """The policy of exact decoding to export: the fastest with the slim tier where that pays, else without."""
        return self.fastest_with_slim if self.pays else self.fastest_without_slim

    def fastest_drafted(self, *, by_model: bool) -> TimedPolicy | None:
        """The fastest exact policy that drafts with the draft model, or without one; None where none was tried."""
        found = [one for one in self._last_stage() if (one.drafter is None) == by_model]
        return _fastest(found) if found else None

    def drafter_words(self) -> str | None:
        """Whether exact decoding pays without a draft model; None where it was not tried, or on too few prompts."""
        with_model, without = self.fastest_drafted(by_model=True), self.fastest_drafted(by_model=False)
        if not self.enough or with_model is None or without is None or without.drafter is None:
            return None
        times = (
            f"a token took {1000 * without.seconds_per_token:.1f} ms without ({DRAFTED_BY[without.drafter]}) and "
            f"{1000 * with_model.seconds_per_token:.1f} ms with it"
        )
        if self.exact_policy.drafter is None:
            return f"The draft model pays: {times}."
        return f"No draft model is the fastest: {times}."

    @property
    def fastest_with_slim(self) -> TimedPolicy:
        """The fastest policy that asks q', whether it pays or not."""
        return _fastest([one for one in self._last_stage() if one.slim_tier])

    @property
    def fastest_without_slim(self) -> TimedPolicy:
        """The policy that does not ask q' and was the fastest where that was decided."""
        drafter = self.decision.without_drafter
        return _fastest([one for one in self._last_stage() if not one.slim_tier and one.drafter == drafter])

    @property
    def speculative_stop(self) -> float:
        """The fastest stop bound of speculative decoding."""
        found = [one for one in self._last_stage() if not one.slim_tier and one.drafter is None]
        return _fastest(found).draft_stop_below

    def _last_stage(self) -> list[TimedPolicy]:
        """The policies that took turns last; what came before was timed under other conditions."""
        last = max(one.stage for one in self.policies)
        return [one for one in self.policies if one.stage == last]

    @property
    def seconds_per_token_exact(self) -> float:
        """Of the exact policy that is exported."""
        return self.decision.with_slim if self.pays else self.decision.without_slim

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
        """Whether there is a certified policy that is shown to be faster than the exact one, and by ``LOSSY_GAIN``."""
        found, speed = self.decision.certified, self.decision.certified_speed
        if found is None or speed is None or not speed.above_one:
            return False
        return found < (1 - LOSSY_GAIN) * self.seconds_per_token_exact


def _fastest(policies: Sequence[TimedPolicy]) -> TimedPolicy:
    """Of equally fast ones the first."""
    return min(policies, key=lambda one: one.seconds_per_token)


def without_slim(gates: Gates) -> Gates:
    """Calibrated gates with a slim tier that is never asked."""
    return gates.model_copy(update={"accept_at": NEVER, "regenerate_at": NEVER})


def with_thresholds(gates: Gates, threshold: float, draft_accept_at: float, stop_below: float) -> Gates:
    """Calibrated gates that trust q' from the score ``threshold`` on and the draft model from ``draft_accept_at`` on,
    and stop drafting below ``stop_below``.
    """
    return gates.model_copy(
        update={
            "draft_accept_at": draft_accept_at,
            "draft_stop_below": stop_below,
            "accept_at": threshold,
            "regenerate_at": threshold,
        }
    )
