"""Timings of policies, made up for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence

from viasd_calib.calibration.paired import FEWEST_PROMPTS, Interval
from viasd_calib.calibration.policy_timing import Decision, PolicyTiming, TimedPolicy


def exactly(ratio: float, n_prompts: int) -> Interval:
    """A ratio of speeds that is the same on every prompt."""
    bound = ratio if n_prompts >= FEWEST_PROMPTS else None
    return Interval(median=ratio, low=bound, high=bound, n=n_prompts)


def make_policy(slim_tier: bool, seconds: float, threshold: float = 0.7, **changes: object) -> TimedPolicy:
    """A policy of the last stage that took ``seconds`` a token."""
    entries = {
        "stage": 3, "slim_tier": slim_tier, "threshold": threshold if slim_tier else None, "draft_accept_at": 0.9,
        "draft_stop_below": 0.3, "seconds_per_token": seconds,
    }  # fmt: skip
    return TimedPolicy.model_validate({**entries, **changes})


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
        by_bound={0.7: with_slim},
        n_prompts=n_prompts,
        policies=tuple(policies) or (make_policy(True, with_slim), make_policy(False, without_slim)),
        decision=Decision(
            with_slim=with_slim, without_slim=without_slim, certified=certified, slim_speed=slim_speed,
            certified_speed=certified_speed,
        ),
    )  # fmt: skip
