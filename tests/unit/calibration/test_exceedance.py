"""The test that a bound is exceeded: its capital and its error rate exactly."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.calibration.exceedance import BETS, ExceedanceTest
from viasd_calib.errors import CalibrationError


def after(losses: tuple[float, ...] | list[float], bound: float) -> ExceedanceTest:
    test = ExceedanceTest(bound)
    for loss in losses:
        test.add(loss)
    return test


def probability(losses: tuple[float, ...], mean: float) -> float:
    return math.prod(mean if loss else 1 - mean for loss in losses)


@pytest.mark.parametrize("bound", [0.02, 0.3, 0.7])
def test_the_capital_is_a_martingale_where_the_loss_is_the_bound(bound: float) -> None:
    """Exactly: over all sequences of ten losses of 0 or 1 the capital is 1 on average."""
    every = itertools.product((0.0, 1.0), repeat=10)
    expected = sum(probability(losses, bound) * after(losses, bound).e_value for losses in every)
    assert expected == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("bound", "level"), [(0.2, 0.1), (0.3, 0.05), (0.5, 0.1), (0.7, 0.2)])
def test_the_error_is_within_the_level(bound: float, level: float) -> None:
    """Exactly: the probability that twelve losses of 0 or 1, of mean ``bound``, ever come to a p-value of ``level``."""
    every = itertools.product((0.0, 1.0), repeat=12)
    error = sum(probability(losses, bound) for losses in every if after(losses, bound).p_value <= level)
    assert 0.1 * level < error <= level


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.9))
def test_the_p_value_falls_alone_and_is_of_the_largest_capital(losses: list[float], bound: float) -> None:
    test, largest, before = ExceedanceTest(bound), 1.0, 1.0
    for loss in losses:
        test.add(loss)
        largest = max(largest, test.e_value)
        assert test.largest_e_value == pytest.approx(largest)
        assert test.p_value == pytest.approx(1 / largest)
        assert test.p_value <= before
        before = test.p_value


def test_no_loss_takes_more_than_the_bets_leave() -> None:
    """What ruins the largest bets leaves the small ones: after 100 texts without a loss the capital is not gone."""
    assert after([0.0] * 100, 0.02).e_value > 0.3 / BETS
    assert after([1.0] * 2000, 0.02).e_value == pytest.approx(math.exp(700))  # and no overflow


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.1, math.nan])
def test_a_bound_that_cannot_be_is_refused(bound: float) -> None:
    with pytest.raises(CalibrationError, match="give one above 0 and below 1"):
        ExceedanceTest(bound)


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan])
def test_a_loss_that_cannot_be_is_refused(loss: float) -> None:
    with pytest.raises(CalibrationError, match="losses lie between 0 and 1"):
        ExceedanceTest(0.1).add(loss)
