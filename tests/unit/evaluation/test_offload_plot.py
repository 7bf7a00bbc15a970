"""The picture of where reading layers for each pass pays."""

from __future__ import annotations

import pytest

from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.plots import CostPoint, speedup_against_cost


def point(ratio: float, simulated: bool, speed: float) -> CostPoint:
    found = Interval(median=speed, low=speed - 0.1, high=speed + 0.1, n=12)
    return CostPoint(ratio, simulated, {"three_tier": found, "self_speculative": found})


@pytest.mark.parametrize("count", [1, 3])
def test_each_point_is_drawn_once_and_named_once(count: int) -> None:
    points = [point(2.0**number, number > 0, 1 + number) for number in range(count)]
    (axes,) = speedup_against_cost(points[::-1]).axes
    marks = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    assert sorted(line.get_xdata()[0] for line in marks) == sorted([2.0**number for number in range(count)] * 2)
    assert [line.get_fillstyle() for line in marks if line.get_xdata()[0] == 1] == ["full"] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["self-speculative", "three-tier"]
    assert axes.get_xscale() == "log"
