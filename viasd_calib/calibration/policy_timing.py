"""Whether the slim tier earns its passes, a draft model its steps, a certified loss its time, and at which thresholds:
policies side by side, on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from viasd_calib.decoding.conversation import Answering, converse
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.models import Verifier
from viasd_calib.progress import steps
from viasd_calib.prompts import Prompt
from viasd_calib.spec import Audit, Gates, PolicyDrafter

STRICT_THRESHOLDS = (0.5, 0.7, 0.85)
"""Thresholds that are tried beside the candidate's: with audit ``strict`` a wrong pending token costs time alone, so
that less careful ones than a stated loss asks for may be faster. Below 0.5 slim passes are wasted on tokens that q
then rejects."""
STRICT_DRAFT_THRESHOLD = 0.9
"""The least of the draft gate's then: a wrong token there spoils all that q' makes of it, and asking q' is cheap."""
STRICT_STOPS = (0.25, 0.4, 0.55, 0.7)
"""Stop bounds that are tried beside the one that a replay found, which counts neither catch-up passes nor gates."""
STOP_STEP = 0.15
"""From one of them to the next, and from the one of decoding without the slim tier to its two neighbours."""
HIGHEST_STOP = 0.95
"""Above it hardly a second token would be drafted."""

DRAFTED_BY: dict[PolicyDrafter, str] = {
    "slim": "the slim verifier writes token by token",
    "lookup": "lookup drafts",
}

ALONE_THRESHOLDS = (0.4, 0.7)
"""Thresholds that are tried without a draft model, where each token of q' costs a slim pass."""

PENDING_SHARES = (0.5, 0.7)
"""Parts of ``max_pending`` that are tried in its place: a catch-up of many tokens is a wide pass, which is dear where
computing limits it and not reading weights, and all after a wrong token is lost."""

LOSSY_GAIN = 0.05
"""Share of its time that a certified policy must save to be exported unasked: its text may diverge."""
FEWEST_PROMPTS = 6
"""Prompts that must have been timed for one policy to be called faster: of fewer, even all on one side show nothing at
95 % (a sign test: 2 / 2^n)."""


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


class PolicyTiming(BaseModel):
    """What the same prompts took with the slim tier and without it.

    Attributes:
        by_bound: seconds a token of exact decoding with the slim tier, by the score at which a tier trusts a token; at
            the stop bound that a replay found, in the first stage of the search.
        seconds_per_token_without: of exact decoding with draft gate and full verifier alone, at its fastest stop bound.
        seconds_per_token_certified: of the certified policy, whose text may diverge; None where there is none.
        policies: all exact ones that were tried, in order; empty in what earlier releases wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by_bound: dict[float, float] = Field(min_length=1)
    seconds_per_token_without: float = Field(gt=0)
    seconds_per_token_certified: float | None = Field(None, gt=0)
    n_prompts: int = Field(ge=1)
    policies: tuple[TimedPolicy, ...] = ()

    @property
    def threshold(self) -> float:
        """The fastest threshold."""
        return min(self.by_bound, key=self.by_bound.__getitem__)

    @property
    def seconds_per_token(self) -> float:
        """With the slim tier, at that threshold and the fastest stop bound and draft gate's threshold."""
        last = self._last_stage(slim_tier=True)
        return _fastest(last).seconds_per_token if last else self.by_bound[self.threshold]

    @property
    def exact_policy(self) -> TimedPolicy:
        """The policy of exact decoding to export: the fastest with the slim tier where that pays, else without.

        Raises:
            ValueError: there are no ``policies``.
        """
        return _fastest(self._last_stage(slim_tier=self.pays))

    def fastest_drafted(self, *, by_model: bool) -> TimedPolicy | None:
        """The fastest exact policy that drafts with the draft model, or without one; None where none was tried."""
        last = [*self._last_stage(slim_tier=True), *self._last_stage(slim_tier=False)]
        found = [one for one in last if (one.drafter is None) == by_model]
        return _fastest(found) if found else None

    def drafter_words(self) -> str | None:
        """Whether exact decoding pays without a draft model; None where it was not tried, or on too few prompts.

        Example:
            >>> PolicyTiming(by_bound={0.7: 0.05}, seconds_per_token_without=0.03, n_prompts=8).drafter_words() is None
            True
        """
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
        """The fastest policy that asks q', whether it pays or not.

        Raises:
            ValueError: there are no ``policies``.
        """
        return _fastest(self._last_stage(slim_tier=True))

    @property
    def speculative_stop(self) -> float:
        """The fastest stop bound without the slim tier.

        Raises:
            ValueError: there are no ``policies``.
        """
        return _fastest(self._last_stage(slim_tier=False)).draft_stop_below

    def _last_stage(self, *, slim_tier: bool) -> list[TimedPolicy]:
        """The policies that took turns last; what came before was timed under other conditions."""
        last = max((one.stage for one in self.policies), default=0)
        return [one for one in self.policies if (one.stage, one.slim_tier) == (last, slim_tier)]

    @property
    def seconds_per_token_exact(self) -> float:
        """Of the fastest policy whose text is the verifier's."""
        return min(self.seconds_per_token, self.seconds_per_token_without)

    @property
    def pays(self) -> bool:
        """Whether the slim tier makes exact decoding faster, timed on ``FEWEST_PROMPTS`` at least.

        Example:
            >>> PolicyTiming(by_bound={0.7: 0.05, 0.9: 0.06}, seconds_per_token_without=0.03, n_prompts=8).pays
            False
        """
        return self.enough and self.seconds_per_token < self.seconds_per_token_without

    @property
    def enough(self) -> bool:
        """Whether enough prompts were timed to say."""
        return self.n_prompts >= FEWEST_PROMPTS

    @property
    def lossy_pays(self) -> bool:
        """Whether there is a certified policy that is faster than all exact ones by ``LOSSY_GAIN``, timed on enough
        prompts.
        """
        certified = self.seconds_per_token_certified
        return self.enough and certified is not None and certified < (1 - LOSSY_GAIN) * self.seconds_per_token_exact


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


def stops_with_slim(stop: float) -> list[float]:
    """Stop bounds that are tried with the slim tier, rising: ``stop`` and those of ``STRICT_STOPS`` that are further
    from it than half of their step.

    Example:
        >>> stops_with_slim(0.6), stops_with_slim(0.0)
        ([0.25, 0.4, 0.6, 0.7], [0.0, 0.25, 0.4, 0.55, 0.7])
    """
    return sorted([stop, *(one for one in STRICT_STOPS if abs(one - stop) > STOP_STEP / 2)])


def stops_without_slim(stop: float) -> list[float]:
    """Stop bounds that are tried without the slim tier, rising: ``stop`` and its neighbours.

    Example:
        >>> stops_without_slim(0.3), stops_without_slim(0.05)
        ([0.15, 0.3, 0.45], [0.0, 0.05, 0.2])
    """
    lower, higher = max(stop - STOP_STEP, 0.0), min(stop + STOP_STEP, HIGHEST_STOP)
    return sorted({round(lower, 4), stop, round(higher, 4)})


def threshold_stage(gates: Gates, slim_drafts: bool = False) -> list[Tried]:
    """The first stage of the search: exact decoding with the slim tier at several thresholds, rising, at the stop bound
    of ``gates``. The draft gate's threshold is the same, or ``STRICT_DRAFT_THRESHOLD`` where that is more.

    Args:
        slim_drafts: whether q' is tried without a draft model, too.
    """
    drafted = [
        Tried(with_thresholds(gates, threshold, max(threshold, STRICT_DRAFT_THRESHOLD), gates.draft_stop_below))
        for threshold in sorted({*STRICT_THRESHOLDS, gates.accept_at})
    ]
    return drafted + [_without_model(gates, one, "slim") for one in ALONE_THRESHOLDS if slim_drafts]


def _without_model(gates: Gates, threshold: float, drafter: PolicyDrafter) -> Tried:
    return Tried(with_thresholds(gates, threshold, NEVER, gates.draft_stop_below), drafter)


def stop_stage(
    gates: Gates,
    threshold: float,
    stop_without_slim: float,
    drafters: Sequence[PolicyDrafter] = (),
    threshold_without_model: float = ALONE_THRESHOLDS[0],
) -> list[Tried]:
    """The second stage: exact decoding at one threshold, with stop bounds around that of ``gates`` and a draft gate
    that accepts from a score on, or never; without the slim tier, with stop bounds around ``stop_without_slim``; and
    with what drafts in the draft model's place, at a threshold of its own.
    """
    with_slim = [
        with_thresholds(gates, threshold, draft_accept_at, stop)
        for draft_accept_at in (max(threshold, STRICT_DRAFT_THRESHOLD), NEVER)
        for stop in stops_with_slim(gates.draft_stop_below)
    ]
    without = [
        without_slim(gates).model_copy(update={"draft_stop_below": stop})
        for stop in stops_without_slim(stop_without_slim)
    ]
    without_model = [_without_model(gates, threshold_without_model, one) for one in drafters]
    return [*(Tried(one) for one in [*with_slim, *without]), *without_model]


def last_stage(gates: Gates, timed: Sequence[TimedPolicy], max_pending: int) -> list[Tried]:
    """The last stage: the fastest of each kind take turns again, since the fastest of many is in part the luckiest. The
    fastest that asks q' is tried with less pending tokens, too.

    Args:
        gates: that the thresholds of policies are put into.
        timed: the policies of the second stage.
        max_pending: the bound that they were timed with.
    """
    kinds: dict[tuple[bool, PolicyDrafter | None], TimedPolicy] = {}
    for one in sorted(timed, key=lambda one: one.seconds_per_token):
        kinds.setdefault((one.slim_tier, one.drafter), one)
    fastest = _fastest([one for one in kinds.values() if one.slim_tier])
    bounds = {max(1, round(share * max_pending)) for share in PENDING_SHARES} - {max_pending}
    return [
        *(Tried(one.applied_to(gates), one.drafter) for one in kinds.values()),
        *(Tried(fastest.applied_to(gates), fastest.drafter, bound) for bound in sorted(bounds)),
    ]


def time_policies(
    decoder_for: DecoderFor,
    gates: Gates,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    stop_without_slim: float,
    max_pending: int,
    certified: bool,
    drafters: Sequence[PolicyDrafter] = (),
) -> PolicyTiming:
    """Search for the fastest policy of exact decoding, and time the certified one beside it.

    The search has three stages, :func:`threshold_stage`, at the thresholds that were fastest :func:`stop_stage`, and
    :func:`last_stage` of the fastest. The policies of a stage decode ``prompts`` in turns: drift strikes all alike.
    Where ``gates`` are certified, they themselves with audit ``off`` are timed in the last stage.

    Args:
        gates: with a threshold for all tiers, which is tried beside ``STRICT_THRESHOLDS``, and the stop bound that a
            replay found at the costs of slim passes.
        prompts: one at least; the first one is also the warm-up.
        stop_without_slim: the stop bound that a replay found at the costs of full passes.
        max_pending: most tokens that may wait for q where a policy does not say.
        drafters: what is tried in the draft model's place.
    """

    policies: list[TimedPolicy] = []

    def add(stage: int, label: str, exact: Sequence[Tried], others: Sequence[Answering] = ()) -> list[float]:
        """Time policies, and ``others`` in turns with them, whose seconds a token are given back."""
        decoders = [*(decoder_for(one, "strict") for one in exact), *others]
        seconds = _seconds_per_token(label, decoders, verifier, prompts, max_new_tokens)
        of_exact = seconds[: len(exact)]
        policies.extend(TimedPolicy.of(one, stage, spent) for one, spent in zip(exact, of_exact, strict=True))
        return seconds[len(exact) :]

    def by_threshold(drafter: PolicyDrafter | None) -> dict[float, float]:
        own = [one for one in policies if one.drafter == drafter]
        return {one.threshold: one.seconds_per_token for one in own if one.threshold is not None}

    add(1, "timing thresholds", threshold_stage(gates, "slim" in drafters))
    by_bound, alone = by_threshold(None), by_threshold("slim")

    second = stop_stage(
        gates,
        min(by_bound, key=by_bound.__getitem__),
        stop_without_slim,
        drafters,
        min(alone, key=alone.__getitem__, default=ALONE_THRESHOLDS[0]),
    )
    add(2, "timing where drafting stops", second)

    fastest = last_stage(gates, [one for one in policies if one.stage == 2], max_pending)
    of_certified = add(3, "timing the fastest", fastest, [decoder_for(Tried(gates), "off")] if certified else [])
    return PolicyTiming(
        by_bound=by_bound,
        seconds_per_token_without=min(
            one.seconds_per_token for one in policies if one.stage == 3 and not one.slim_tier
        ),
        seconds_per_token_certified=of_certified[0] if certified else None,
        n_prompts=len(prompts),
        policies=tuple(policies),
    )


def _seconds_per_token(
    label: str, decoders: Sequence[Answering], verifier: Verifier, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[float]:
    """Seconds a token that each decoder takes on the same prompts, after one of them as a warm-up."""
    seconds, tokens = [0.0] * len(decoders), [0] * len(decoders)
    for decoder in decoders:
        list(converse(decoder, verifier, prompts[0], max_new_tokens))
    with steps(label, len(prompts), "prompts") as running:
        for number, prompt in enumerate(prompts):
            for which in ((number + step) % len(decoders) for step in range(len(decoders))):
                begin = time.perf_counter()
                turns = list(converse(decoders[which], verifier, prompt, max_new_tokens))
                seconds[which] += time.perf_counter() - begin
                tokens[which] += sum(len(turn.generation.tokens) for turn in turns)
            running.advance()
    return [spent / count for spent, count in zip(seconds, tokens, strict=True)]
