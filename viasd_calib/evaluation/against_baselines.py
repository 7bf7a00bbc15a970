"""Whether anybody loses by three tiers: their speed over the fastest baseline, by task and by length of prompts."""

from __future__ import annotations

from collections.abc import Mapping

from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.bench import BenchResult, GroupResult

LOSS = 0.98
"""An interval that lies below this share of the fastest baseline's speed is a loss; two in a hundred are noise."""


def against_baselines(result: BenchResult) -> list[str]:
    """A sentence on all prompts, and one on the task and the length of prompts with the least speed-up.

    Each is over whichever of autoregressive, speculative and prompt-lookup decoding was the fastest there. Nothing is
    said where ``three_tier`` or all of these were not run on single texts.
    """
    three_tier = result.methods.get("three_tier")
    if three_tier is None or three_tier.fastest_baseline is None or three_tier.speedup_vs_fastest_baseline is None:
        return []
    whole = (
        f"three_tier over {three_tier.fastest_baseline}, the fastest baseline: "
        f"{three_tier.speedup_vs_fastest_baseline.words}"
    )
    known = _shown(result.groups)
    if not known:
        return [f"{whole}."]
    name, (baseline, least) = min(known.items(), key=lambda one: one[1][1].median)
    losing = [group for group, (_, found) in known.items() if found.bounds is not None and found.bounds[1] < LOSS]
    verdict = f"below {LOSS:g} as a whole: {', '.join(losing)}" if losing else f"no interval lies below {LOSS:g}"
    return [
        f"{whole}; the least of {len(known)} tasks and lengths is {name}, {least.words} over {baseline}; {verdict}."
    ]


def _shown(groups: Mapping[str, GroupResult]) -> dict[str, tuple[str, Interval]]:
    """Groups with enough prompts for an interval: their fastest baseline, and the speed-up over it."""
    found: dict[str, tuple[str, Interval]] = {}
    for name, group in groups.items():
        three_tier = group.methods["three_tier"]
        speed, baseline = three_tier.speedup_vs_fastest_baseline, three_tier.fastest_baseline
        if baseline is not None and speed is not None and speed.bounds is not None:
            found[name] = (baseline, speed)
    return found
