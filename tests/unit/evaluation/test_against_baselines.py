"""Three tiers against the fastest baseline, in words: where anybody loses by them."""

from __future__ import annotations

from tests.unit.evaluation.test_report import bench, method
from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.against_baselines import against_baselines
from viasd_calib.evaluation.bench import BenchResult, GroupResult


def group(median: float, high: float | None, baseline: str = "speculative") -> GroupResult:
    """Prompts on which three tiers have this speed over the fastest baseline; without ``high`` there are too few."""
    low = None if high is None else 2 * median - high
    found = Interval(median=median, low=low, high=high, n=12)
    three_tier = method(30.0, fastest_baseline=baseline, speedup_vs_fastest_baseline=found)
    return GroupResult(n_prompts=12, methods={"three_tier": three_tier})


def result(tasks: dict[str, GroupResult], bands: dict[int, GroupResult]) -> BenchResult:
    whole = group(1.1, 1.2).methods
    return bench(whole).model_copy(update={"by_task": tasks, "by_context": bands})


def test_the_task_or_length_with_the_least_speed_is_named() -> None:
    found = against_baselines(
        result({"chat": group(1.2, 1.3), "coding": group(0.99, 1.02, "prompt_lookup")}, {256: group(1.1, 1.2)})
    )
    assert found == [
        "three_tier over speculative, the fastest baseline: 1.10 [1.00, 1.20]; the least of 2 tasks and lengths is "
        "coding, 0.99 [0.96, 1.02] over prompt_lookup; no interval lies below 0.98."
    ]


def test_what_lies_below_as_a_whole_is_named() -> None:
    """Two lengths of three, and no task; an interval that holds 0.98 is not below it."""
    bands = {256: group(0.95, 0.97), 512: group(0.9, 0.979), 1024: group(0.9, 0.98)}
    (found,) = against_baselines(result({"chat": group(1.1, 1.2)}, bands))
    assert found.endswith("below 0.98 as a whole: prompts of up to 256 tokens, prompts of up to 512 tokens.")


def test_too_few_prompts_show_nothing() -> None:
    (found,) = against_baselines(result({"chat": group(0.5, None), "coding": group(0.6, None)}, {}))
    assert found == "three_tier over speculative, the fastest baseline: 1.10 [1.00, 1.20]."


def test_nothing_is_said_without_three_tiers_or_a_baseline() -> None:
    assert against_baselines(bench({"autoregressive": method(20.0)})) == []
    assert against_baselines(bench({"three_tier": method(20.0)})) == []
