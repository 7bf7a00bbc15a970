"""Search for the fastest policy of exact decoding on the clock: thresholds, stop bounds, drafters, pending tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from viasd_calib.calibration.paired import ERROR, FEWEST_PROMPTS, Spent, decode_in_turns, speed_ratio
from viasd_calib.calibration.policy_timing import (
    BASELINES,
    Decision,
    DecoderFor,
    PolicyTiming,
    TimedPolicy,
    Tried,
    with_thresholds,
    without_slim,
)
from viasd_calib.decoding.conversation import Answering
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.models import Verifier
from viasd_calib.prompts import Prompt
from viasd_calib.spec import Gates, PolicyDrafter

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

ALONE_THRESHOLDS = (0.4, 0.7)
"""Thresholds that are tried without a draft model, where each token of q' costs a slim pass."""

PENDING_SHARES = (0.5, 0.7)
"""Parts of ``max_pending`` that are tried in its place: a catch-up of many tokens is a wide pass, which is dear where
computing limits it and not reading weights, and all after a wrong token is lost."""

LOOKS = 3
"""Times at which a timing that decides may end."""


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
    that accepts from a score on, or never; without the slim tier, with stop bounds around ``stop_without_slim``, with
    lookup where it is among ``drafters``, and with nothing that drafts; and with what drafts in the draft model's
    place, at a threshold of its own.
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
    baselines: list[PolicyDrafter] = ["lookup", "none"] if "lookup" in drafters else ["none"]
    without_both = [Tried(without_slim(gates), one) for one in baselines]
    without_model = [_without_model(gates, threshold_without_model, one) for one in drafters]
    return [*(Tried(one) for one in [*with_slim, *without]), *without_both, *without_model]


def last_stage(gates: Gates, timed: Sequence[TimedPolicy], max_pending: int, draft_length: int) -> list[Tried]:
    """The last stage: the fastest of each kind take turns again, since the fastest of many is in part the luckiest. The
    fastest that asks q' is tried with less pending tokens, too.

    Args:
        gates: that the thresholds of policies are put into.
        timed: the policies of the second stage.
        max_pending: the bound that they were timed with.
        draft_length: most tokens drafted a round; without room for a block and a token after it q' is not asked.
    """
    kinds: dict[tuple[bool, PolicyDrafter | None], TimedPolicy] = {}
    for one in sorted(timed, key=lambda one: one.seconds_per_token):
        kinds.setdefault((one.slim_tier, one.drafter), one)
    fastest = min((one for one in kinds.values() if one.slim_tier), key=lambda one: one.seconds_per_token)
    room = 0 if fastest.drafter == "slim" else draft_length
    bounds = {bound for share in PENDING_SHARES if room < (bound := round(share * max_pending)) < max_pending}
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
    deciding: Sequence[Prompt],
    stop_without_slim: float,
    max_pending: int,
    draft_length: int,
    certified: bool,
    drafters: Sequence[PolicyDrafter] = (),
) -> PolicyTiming:
    """Search for the fastest policy of exact decoding, and decide whether its slim tier pays.

    The search has three stages, :func:`threshold_stage`, at the thresholds that were fastest :func:`stop_stage`, and
    :func:`last_stage` of the fastest. The policies of a stage decode ``prompts`` in turns. Then the fastest with the
    slim tier, the fastest of each kind without it, and where ``gates`` are certified they themselves with audit
    ``off``, decode ``deciding`` in turns, see :func:`decide`.

    Args:
        gates: with a threshold for all tiers, which is tried beside ``STRICT_THRESHOLDS``, and the stop bound that a
            replay found at the costs of slim passes.
        prompts: one at least; the first one is also the warm-up.
        deciding: other prompts, since the fastest of many policies is in part the luckiest on its own.
        stop_without_slim: the stop bound that a replay found at the costs of full passes.
        max_pending: most tokens that may wait for q where a policy does not say.
        draft_length: most tokens drafted a round.
        drafters: what is tried in the draft model's place.
    """

    policies: list[TimedPolicy] = []

    def add(stage: int, label: str, tried: Sequence[Tried]) -> list[TimedPolicy]:
        decoders = [decoder_for(one, "strict") for one in tried]
        spent = decode_in_turns(label, decoders, verifier, prompts, max_new_tokens)
        timed = [TimedPolicy.of(one, stage, took.seconds_per_token) for one, took in zip(tried, spent, strict=True)]
        policies.extend(timed)
        return timed

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
    fastest = last_stage(gates, add(2, "timing where drafting stops", second), max_pending, draft_length)
    last = add(3, "timing the fastest", fastest)

    pairs = sorted(zip(last, fastest, strict=True), key=lambda pair: pair[0].seconds_per_token)
    with_slim = next(tried for one, tried in pairs if one.slim_tier)
    without: dict[PolicyDrafter | None, Tried] = {one.drafter: tried for one, tried in pairs if not one.slim_tier}
    decision = decide(
        decoder_for(with_slim, "strict"),
        {drafter: decoder_for(tried, "strict") for drafter, tried in without.items()},
        decoder_for(Tried(gates), "off") if certified else None,
        verifier, deciding, max_new_tokens,
    )  # fmt: skip
    return PolicyTiming(by_bound=by_bound, n_prompts=len(prompts), policies=tuple(policies), decision=decision)


def decide(
    with_slim: Answering,
    without_slim: Mapping[PolicyDrafter | None, Answering],
    certified: Answering | None,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> Decision:
    """Which of the fastest policies is faster, by a paired interval over prompts.

    ``LOOKS`` times, at equal numbers of prompts, it is asked whether the interval of each ratio of speeds leaves 1
    out; where all do, the timing ends. Each look has its share of the error (Bonferroni), so that an answer is wrong in
    at most 5 of 100 such timings, whenever it was given. The slim tier must be faster than every policy without it,
    which as a test of all of them needs no smaller share for each (intersection-union, Berger 1982). Of those, the one
    that took the least time is held to be the fastest.

    Args:
        without_slim: by what drafts in the draft model's place, None for the draft model: speculative decoding, and
            with lookup, and nothing drafted.
        prompts: one at least, in an order that has nothing to do with how long they take.
    """
    decoders = [with_slim, *without_slim.values(), *([] if certified is None else [certified])]
    spent = [Spent() for _ in decoders]
    size = max(-(-len(prompts) // LOOKS), FEWEST_PROMPTS)
    parts = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
    for number, part in enumerate(parts):
        took = decode_in_turns(
            "deciding between the fastest", decoders, verifier, part, max_new_tokens, warm_up=number == 0
        )
        spent = [before.and_then(now) for before, now in zip(spent, took, strict=True)]
        found = _compared(spent, [*without_slim], ERROR / len(parts))
        speeds = [found.slim_speed, *([] if found.certified_speed is None else [found.certified_speed])]
        if all(one.leaves_out_one for one in speeds):
            break
    return found


def _compared(spent: Sequence[Spent], drafters: Sequence[PolicyDrafter | None], error: float) -> Decision:
    """The decision as things stand, from what the policies took: with the slim tier, without, and certified.

    Args:
        drafters: of the policies without.
    """
    with_slim, *rest = spent
    without = dict(zip(drafters, rest, strict=False))
    others = rest[len(drafters) :]
    speeds = [speed_ratio(with_slim, one, error=error) for one in without.values()]
    drafter = min(drafters, key=lambda one: without[one].seconds_per_token)
    if None in without and speeds[0].bounds is None:  # too few prompts show nothing
        drafter = None
    slim_speed = min(speeds, key=lambda one: one.median if one.low is None else one.low)
    exact = with_slim if slim_speed.above_one else without[drafter]
    return Decision(
        with_slim=with_slim.seconds_per_token,
        without_slim=without[drafter].seconds_per_token,
        without_drafter=drafter,
        baselines={BASELINES[one]: took.seconds_per_token for one, took in without.items()},
        certified=others[0].seconds_per_token if others else None,
        slim_speed=slim_speed,
        certified_speed=speed_ratio(others[0], exact, error=error) if others else None,
    )
