"""Timings of policies, made up for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from viasd_calib.calibration.paired import FEWEST_PROMPTS, Interval
from viasd_calib.calibration.policy_timing import Decision, PolicyTiming, TimedPolicy
from viasd_calib.decoding.policies import Policy


def exactly(ratio: float, n_prompts: int) -> Interval:
    """A ratio of speeds that is the same on every prompt."""
    bound = ratio if n_prompts >= FEWEST_PROMPTS else None
    return Interval(median=ratio, low=bound, high=bound, n=n_prompts)


def make_policy(slim_tier: bool, seconds: float, **changes: Any) -> TimedPolicy:
    """A policy that took ``seconds`` a token, as was predicted."""
    entries = {"stop_below": 0.3, **({"draft_accept_at": 0.9, "accept_at": 0.7} if slim_tier else {}), **changes}
    return TimedPolicy(policy=Policy(**entries), predicted=seconds, seconds_per_token=seconds)


def make_timing(
    with_slim: float,
    without_slim: float,
    certified: float | None = None,
    n_prompts: int = 8,
    *,
    slim_speed: Interval | None = None,
    certified_speed: Interval | None = None,
    policies: Sequence[TimedPolicy] = (),
) -> PolicyTiming:
    """What policies took, in seconds a token; intervals of ratios have no width unless they are given."""
    slim_speed = slim_speed or exactly(without_slim / with_slim, n_prompts)
    exact = with_slim if slim_speed.above_one else without_slim
    if certified is not None:
        certified_speed = certified_speed or exactly(exact / certified, n_prompts)
    return PolicyTiming(
        n_prompts=n_prompts,
        policies=tuple(policies) or (make_policy(True, with_slim), make_policy(False, without_slim)),
        decision=Decision(
            with_slim=with_slim, without_slim=without_slim, certified=certified, slim_speed=slim_speed,
            certified_speed=certified_speed,
        ),
    )  # fmt: skip
