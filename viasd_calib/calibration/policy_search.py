"""Which policy of exact decoding is the fastest on the clock, of the few that a replay has proposed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from viasd_calib.calibration.paired import ERROR, FEWEST_PROMPTS, Spent, decode_in_turns, speed_ratio
from viasd_calib.calibration.policy_timing import Decision, PolicyTiming, TimedCertified, TimedPolicy
from viasd_calib.decoding.conversation import Answering
from viasd_calib.decoding.policies import WITHOUT_SLIM, Policy
from viasd_calib.models import Verifier
from viasd_calib.prompts import Prompt
from viasd_calib.spec import PolicyDrafter

FAR_SLOWER = 2.0
"""How many times the time of the fastest policy without the slim tier another one of these must take to be out of the
question: far beyond what the few prompts of the search may be wrong by."""
LOOKS = 3
"""Times at which a timing that decides may end."""


def time_policies(
    decoder_of: Callable[[Policy], Answering],
    predicted: Mapping[Policy, float],
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    deciding: Sequence[Prompt],
    certified: Answering | None = None,
) -> PolicyTiming:
    """Decode policies of exact decoding in turns, and decide whether the slim tier pays.

    All decode ``prompts`` in turns. Then the fastest with the slim tier, the fastest of each kind without it but for
    those that were ``FAR_SLOWER``, and the certified policy, decode ``deciding`` in turns, see :func:`decide`.

    Args:
        predicted: seconds a token of each policy by a replay, *simulated*; one of them asks q', and of those that do
            not one drafts with the draft model.
        prompts: one at least; the first one is also the warm-up.
        deciding: other prompts, since the fastest of several policies is in part the luckiest on its own.
        certified: decodes with audit ``off``; None where nothing is certified.
    """
    decoders = [decoder_of(policy) for policy in predicted]
    spent = decode_in_turns("timing the policies that a replay proposes", decoders, verifier, prompts, max_new_tokens)
    policies = [
        TimedPolicy(policy=policy, predicted=seconds, seconds_per_token=took.seconds_per_token)
        for (policy, seconds), took in zip(predicted.items(), spent, strict=True)
    ]
    ordered = [one.policy for one in sorted(policies, key=lambda one: one.seconds_per_token)]
    with_slim = next(policy for policy in ordered if policy.slim_tier)
    without: dict[PolicyDrafter | None, Policy] = {}
    for policy in ordered:
        if not policy.slim_tier:
            without.setdefault(policy.drafter, policy)
    took = {one.policy: one.seconds_per_token for one in policies}
    least = min(took[policy] for policy in without.values())
    without = {drafter: policy for drafter, policy in without.items() if took[policy] <= FAR_SLOWER * least}
    decision = decide(
        decoder_of(with_slim), {drafter: decoder_of(policy) for drafter, policy in without.items()},
        [] if certified is None else [certified], verifier, deciding, max_new_tokens,
    )  # fmt: skip
    return PolicyTiming(n_prompts=len(prompts), policies=tuple(policies), decision=decision)


def decide(
    with_slim: Answering,
    without_slim: Mapping[PolicyDrafter | None, Answering],
    certified: Sequence[Answering],
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch: int = 1,
) -> Decision:
    """Which of the fastest policies is faster, by a paired interval over prompts.

    ``LOOKS`` times, at equal numbers of prompts, it is asked whether the interval of each ratio of speeds leaves 1
    out; where all do, the timing ends. Each look has its share of the error (Bonferroni), so that an answer is wrong in
    at most 5 of 100 such timings, whenever it was given. The slim tier must be faster than every policy without it,
    which as a test of all of them needs no smaller share for each (intersection-union, Berger 1982). Of those, the one
    that took the least time is held to be the fastest. Of several certified policies one that is faster is asked for,
    so each has its share of the error.

    Args:
        without_slim: by what drafts in the draft model's place, None for the draft model: speculative decoding, and
            with lookup, and nothing drafted.
        certified: policies whose texts may diverge; none where nothing is certified.
        prompts: one at least, in an order that has nothing to do with how long they take.
        batch: prompts that are answered together; intervals are then over batches.
    """
    decoders = [with_slim, *without_slim.values(), *certified]
    spent = [Spent() for _ in decoders]
    size = batch * max(-(-len(prompts) // (LOOKS * batch)), FEWEST_PROMPTS)
    parts = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
    for number, part in enumerate(parts):
        took = decode_in_turns(
            "deciding between the fastest", decoders, verifier, part, max_new_tokens, warm_up=number == 0, batch=batch
        )
        spent = [before.and_then(now) for before, now in zip(spent, took, strict=True)]
        found = _compared(spent, [*without_slim], ERROR / len(parts))
        speeds = [found.slim_speed, *(one.speed for one in found.candidates)]
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
    timed = [
        TimedCertified(
            seconds_per_token=one.seconds_per_token, speed=speed_ratio(one, exact, error=error / len(others))
        )
        for one in others
    ]
    best = min(timed, key=lambda one: (not one.speed.above_one, one.seconds_per_token), default=None)
    return Decision(
        with_slim=with_slim.seconds_per_token,
        without_slim=without[drafter].seconds_per_token,
        without_drafter=drafter,
        baselines={WITHOUT_SLIM[one]: took.seconds_per_token for one, took in without.items()},
        certified=None if best is None else best.seconds_per_token,
        slim_speed=slim_speed,
        certified_speed=None if best is None else best.speed,
        candidates=tuple(timed),
    )
