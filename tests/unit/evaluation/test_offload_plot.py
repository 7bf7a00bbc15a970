"""The picture of where reading layers for each pass pays."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.plots import CostPoint, read_off, speedup_against_cost, write_figure


def point(ratio: float, simulated: bool, speed: float) -> CostPoint:
    found = Interval(median=speed, low=speed - 0.1, high=speed + 0.1, n=12)
    return CostPoint(f"speed {ratio:g}", ratio, simulated, {"three_tier": found, "self_speculative": found})


def marked(axes: Axes, marker: str | None = None) -> list[float]:
    """Where marks stand: all but those of what was read off, or those of one kind."""
    lines = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    chosen = [line for line in lines if (line.get_marker() == marker if marker else line.get_marker() != "x")]
    return sorted(line.get_xdata()[0] for line in chosen)


@pytest.mark.parametrize("count", [1, 3])
def test_each_point_is_drawn_once_and_named_once(count: int) -> None:
    points = [point(2.0**number, number > 0, 1 + number) for number in range(count)]
    figure = speedup_against_cost(points[::-1])
    (axes,) = figure.axes
    assert marked(axes) == sorted([2.0**number for number in range(count)] * 2)
    own = [line.get_fillstyle() for line in axes.lines if line.get_marker() == "o" and line.get_xdata()[0] == 1]
    assert own == ["full"]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    simulated = ["reading slowed down (simulated)"] if count > 1 else []
    assert words == ["self-speculative", "three-tier", *simulated, "this machine as it is"]
    assert sorted(text.get_text() for text in axes.texts) == sorted(one.name for one in points)
    assert axes.get_xscale() == "log"


def test_names_of_close_points_stand_apart() -> None:
    axes = speedup_against_cost([point(ratio, True, 2.0) for ratio in (1.0, 5.0, 5.05, 5.1, 50.0)]).axes[0]
    places = sorted(text.get_position()[0] for text in axes.texts)
    assert all(after - before > 0.05 for before, after in pairwise(places))


def test_a_profiles_machine_is_read_off_the_lines_and_said_to_be(tmp_path: Path) -> None:
    figure = speedup_against_cost([point(1.0, True, 1.0), point(16.0, True, 3.0)], machine=4.0)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(4.0, pytest.approx(2.0))] * 2
    assert "a profile's machine (not decoded)" in [text.get_text() for text in figure.legends[0].get_texts()]
    write_figure(figure, tmp_path / "picture.png")  # which lays it out


@pytest.mark.parametrize("ratio", [0.9, 20.0])
def test_nothing_is_read_off_beyond_the_lines(ratio: float) -> None:
    points = [point(1.0, True, 1.0), point(16.0, True, 3.0)]
    assert read_off(points, ratio) == {}
    assert marked(speedup_against_cost(points, machine=ratio).axes[0], "x") == []


def test_a_method_that_lacks_a_point_is_read_off_its_own_line() -> None:
    alone = CostPoint("", 4.0, True, {"three_tier": Interval(median=9.0, low=None, high=None, n=1)})
    found = read_off([point(1.0, True, 1.0), alone, point(16.0, True, 3.0)], 4.0)
    assert found == {"three_tier": pytest.approx(9.0), "self_speculative": pytest.approx(2.0)}
