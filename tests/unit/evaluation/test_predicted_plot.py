"""The picture of predicted speed-ups against decoded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from viasd_calib.calibration.policy_timing import SpeedUp
from viasd_calib.decoding.policies import Policy
from viasd_calib.evaluation.plots import predicted_against_decoded, write_figure

EVERY = [
    SpeedUp(Policy(stop_below=0.4), 1.7, 1.56),
    SpeedUp(Policy(stop_below=0.5), 1.68, 1.54),
    SpeedUp(Policy("lookup"), 1.2, 1.08),
    SpeedUp(Policy(accept_at=0.7), 1.77, 1.9),
    SpeedUp(Policy("slim", draft_length=0, accept_at=0.85), 0.8, 1.36),
]


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points by label."""
    return {str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.get_lines()}


def test_each_policy_is_a_mark_of_its_kind_at_its_two_speed_ups() -> None:
    (axes,) = predicted_against_decoded(EVERY).axes
    found = drawn(axes)
    assert found["speculative"] == [(1.7, 1.56), (1.68, 1.54)]
    assert found["lookup alone"] == [(1.2, 1.08)]
    assert found["three tiers"] == [(1.77, 1.9)]
    assert found["three tiers without a draft model"] == [(0.8, 1.36)]
    assert found["no drafting"] == [(1.0, 1.0)]
    marks = [line.get_marker() for line in axes.get_lines() if line.get_marker() != "None"]
    assert len(set(marks)) == len(marks) == 5, "kinds are told apart without colours"


def test_the_diagonal_runs_through_both_corners_and_both_axes_are_alike() -> None:
    (axes,) = predicted_against_decoded(EVERY).axes
    low, high = axes.get_xlim()
    assert axes.get_ylim() == (low, high)
    assert drawn(axes)["as predicted"] == [(low, low), (high, high)]
    assert low < 0.8
    assert high > 1.9


def test_the_band_is_a_tenth_of_what_was_decoded() -> None:
    """At a prediction of 0.99, decoded speed-ups of 0.9 to 1.1 are within 10 % of it."""
    (axes,) = predicted_against_decoded(EVERY).axes
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    low, high = axes.get_xlim()
    assert {round(float(y / x), 6) for x, y in corners if x} == {round(1 / 0.9, 6), round(1 / 1.1, 6)}
    assert {float(x) for x, _ in corners} == {low, high}


def test_a_kind_that_was_not_decoded_is_not_in_the_legend() -> None:
    figure = predicted_against_decoded(EVERY[:1])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["within 10 % of decoded", "as predicted", "no drafting", "speculative"]


@pytest.mark.parametrize("count", [1, 5])
def test_it_is_written(tmp_path: Path, count: int) -> None:
    write_figure(predicted_against_decoded(EVERY[:count]), tmp_path / "predicted.svg")
    written = (tmp_path / "predicted.svg").read_text(encoding="utf-8")
    assert "predicted speed-up over no drafting (simulated)" in written
