"""Where a spec lies on the break-even of its slim tier, in words and in the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.test_report import bench, method, spec
from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.break_even import BreakEven, break_even_of, break_even_words
from viasd_calib.evaluation.plots import break_even_picture, write_figure
from viasd_calib.spec import RelativeCost, Route, RoutingSpec

SPEED = Interval(median=1.14, low=1.02, high=1.31, n=40)


def costing(costs: dict[int, float]) -> RoutingSpec:
    return spec(route=Route(attention_skip=[1], relative_cost=RelativeCost(measured=costs, device="cpu",
                                                                           dtype="bfloat16")))  # fmt: skip


def found(costs: dict[int, float], full: float = 0.1, slim: float = 0.4, **changes: Any) -> BreakEven:
    row = method(30.0, SPEED, full_passes_per_token=full, slim_passes_per_token=slim, **changes)
    place = break_even_of(costing(costs), bench({"three_tier": row}))
    assert place is not None
    return place


def test_a_spec_lies_at_its_cost_and_the_full_passes_that_follow_a_slim_one() -> None:
    place = found({1: 0.3, 8: 0.5})
    assert place.costs == {1: 0.3, 8: 0.5}
    assert place.escalated == pytest.approx(0.25)
    assert place.sums == pytest.approx((0.55, 0.75))
    assert (place.cost_setting, place.bench_setting) == ("cpu, bfloat16", "abacus, float32")


@pytest.mark.parametrize(
    ("costs", "verdict"),
    [
        (
            {1: 0.3, 8: 0.5},
            "0.30 to 0.50 of a full one and 0.25 full passes follow it, together 0.55 to 0.75: below 1.",
        ),
        ({4: 0.8}, "0.80 of a full one and 0.25 full passes follow it, together 1.05: not below 1."),
        ({1: 0.7, 8: 0.8}, "together 0.95 to 1.05: below 1 at some widths alone."),
        ({1: 0.75}, "together 1.00: not below 1."),
    ],
)
def test_the_words_hold_the_sum_against_one(costs: dict[int, float], verdict: str) -> None:
    assert verdict in break_even_words(found(costs), costing(costs))


def test_what_was_decoded_stands_beside_it() -> None:
    place = found({4: 0.3})
    words = break_even_words(place, costing({4: 0.3}))
    assert words.endswith("Decoded, three tiers had 1.14 [1.02, 1.31] times the speed of speculative decoding.")
    few = place._replace(speed=Interval(median=1.2, low=None, high=None, n=3))
    assert "1.20 times the speed of speculative decoding on 3 prompts, too few for an interval." in break_even_words(
        few, costing({4: 0.3})
    )
    assert "Decoded" not in break_even_words(place._replace(speed=None), costing({4: 0.3}))


def test_without_a_cost_or_a_slim_pass_there_is_no_point_and_it_says_why() -> None:
    measured = bench({"three_tier": method(30.0)})
    assert break_even_of(spec(), measured) is None
    assert "was not measured" in break_even_words(None, spec())
    never = bench({"three_tier": method(30.0, slim_passes_per_token=0.0)})
    assert break_even_of(costing({4: 0.3}), never) is None
    assert "never asked the slim verifier" in break_even_words(None, costing({4: 0.3}))
    assert break_even_of(costing({4: 0.3}), bench({"speculative": method(30.0)})) is None


def test_the_picture_has_the_line_and_a_mark_for_each_width() -> None:
    (axes,) = break_even_picture(found({8: 0.5, 1: 0.3})).axes
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["break-even"] == [[0, 1], [1, 0]]
    assert lines["this spec, by width (tokens)"] == [
        pytest.approx([0.3, 0.25]),
        pytest.approx([0.5, 0.25]),
    ]
    assert [text.get_text() for text in axes.texts] == ["1", "8"]
    assert (axes.get_xlim(), axes.get_ylim()) == (pytest.approx((0, 1.1)), pytest.approx((0, 1.1)))


def test_a_spec_far_from_paying_is_inside_the_picture(tmp_path: Path) -> None:
    figure = break_even_picture(found({4: 1.5}, full=0.8, slim=0.4))
    (axes,) = figure.axes
    assert axes.get_xlim()[1] > 1.5
    assert axes.get_ylim()[1] > 2
    write_figure(figure, tmp_path / "break_even.svg")
    assert "full passes a slim pass (decoded)" in (tmp_path / "break_even.svg").read_text(encoding="utf-8")
