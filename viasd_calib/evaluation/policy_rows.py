"""Policies that a replay predicted and that were decoded, in a report's words and rows."""

from __future__ import annotations

from viasd_calib.calibration.paired import FEWEST_PROMPTS
from viasd_calib.calibration.policy_timing import CLOSE, PolicyTiming, SpeedUp
from viasd_calib.evaluation.method_columns import NOTHING, percent

POLICY_HEADINGS = (
    "kind", "policy", "ms/token, predicted (simulated)", "ms/token, decoded", "speed-up, predicted (simulated)",
    "speed-up, decoded", "deviation",
)  # fmt: skip


def policy_rows(timing: PolicyTiming) -> list[tuple[str, ...]]:
    """Rows under ``POLICY_HEADINGS``, in the order of the timing; no drafting is what the others are held against."""
    deviations = {one.policy: f"{100 * one.deviation:+.1f} %" for one in timing.speedups()}
    rows: list[tuple[str, ...]] = []
    for one in timing.policies:
        speedups = timing.speedup(one)
        said, took = (NOTHING, NOTHING) if speedups is None else (f"{value:.2f}" for value in speedups)
        times = f"{1000 * one.predicted:.1f}", f"{1000 * one.seconds_per_token:.1f}"
        rows.append((one.policy.kind, one.policy.words, *times, said, took, deviations.get(one.policy, NOTHING)))
    return rows


def prediction_sentence(timing: PolicyTiming) -> str:
    """How many predictions lie in the band, which is off the most, and what too few prompts make of that."""
    speedups = timing.speedups()
    if not speedups:
        return "No drafting, or nothing else, was timed, so there is no speed-up to hold the replay's against."
    worst = max(speedups, key=lambda one: abs(one.deviation))
    close = sum(abs(one.deviation) <= CLOSE for one in speedups)
    return (
        f"The replay predicted the speed-up over no drafting of {close} of {len(speedups)} policies within "
        f"{percent(CLOSE, 0)} of what was decoded on {_prompts(timing.n_prompts)}; the largest deviation is "
        f"{_deviation(worst)}.{_few_words(timing.n_prompts)}"
    )


def _deviation(one: SpeedUp) -> str:
    return (
        f"{100 * one.deviation:+.1f} %, of {one.policy.kind} ({one.policy.words}): predicted {one.predicted:.2f} "
        f"(simulated), decoded {one.measured:.2f}"
    )


def _few_words(n_prompts: int) -> str:
    if n_prompts >= FEWEST_PROMPTS:
        return ""
    return (
        f" These are fewer than the {FEWEST_PROMPTS} prompts that an interval takes: it is what they took, and shows "
        "nothing of others."
    )


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"
