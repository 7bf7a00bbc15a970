"""The test by betting: its p-value by other means, and its error rate exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from viasd_calib.calibration.betting import BettingTest, betting_p_value
from viasd_calib.errors import CalibrationError
from viasd_calib.spec import LARGEST_BET, prompts_needed

LOSSES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def capital_after(losses: tuple[float, ...], bound: float) -> float:
    """The capital itself, not the largest so far."""
    test = BettingTest(bound)
    for loss in losses:
        test.add(loss)
    return math.exp(test._log_capital)


@pytest.mark.parametrize("bound", [0.05, 0.3, 0.7])
def test_the_capital_is_a_martingale_where_the_loss_is_the_bound(bound: float) -> None:
    """Exactly: over all sequences of ten losses of 0 or 1 the capital is 1 on average."""
    expected = sum(
        math.prod(bound if loss else 1 - bound for loss in losses) * capital_after(losses, bound)
        for losses in itertools.product((0.0, 1.0), repeat=10)
    )
    assert expected == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("bound", "level"), [(0.2, 0.1), (0.3, 0.05), (0.5, 0.1), (0.7, 0.2)])
def test_the_error_is_within_the_level(bound: float, level: float) -> None:
    """Exactly: the probability that twelve losses of 0 or 1, of mean ``bound``, ever come to a p-value of ``level``."""
    error = sum(
        math.prod(bound if loss else 1 - bound for loss in losses)
        for losses in itertools.product((0.0, 1.0), repeat=12)
        if betting_p_value(losses, bound) <= level
    )
    assert 0.1 * level < error <= level


def test_bets_are_those_of_an_optimiser() -> None:
    """The capital by bets that SciPy finds, one prompt after the other."""
    losses, bound = np.random.default_rng(0).beta(0.3, 8, 150), 0.06
    largest = LARGEST_BET / (1 - bound)
    logs = [math.log1p(largest * (bound - losses[0]))]
    for count in range(1, len(losses)):
        found = minimize_scalar(
            lambda bet, seen: -float(np.log1p(bet * (bound - seen)).sum()),
            bounds=(0, largest), args=(losses[:count],), method="bounded", options={"xatol": 1e-9},
        )  # fmt: skip
        logs.append(math.log1p(found.x * (bound - losses[count])))
    assert math.log(betting_p_value(losses, bound)) == pytest.approx(-np.cumsum(logs).max(), abs=0.03)


@given(losses=LOSSES, bound=st.floats(0.01, 0.9))
def test_a_p_value_never_rises(losses: list[float], bound: float) -> None:
    test, before = BettingTest(bound), 1.0
    for place, loss in enumerate(losses):
        least = test.least_p_value(len(losses) - place)
        test.add(loss)
        assert 0 < test.p_value <= before
        assert test.least_p_value(len(losses) - place - 1) >= least * (1 - 1e-9)
        before = test.p_value
    assert test.p_value == betting_p_value(losses, bound) == pytest.approx(test.least_p_value(0))


@pytest.mark.parametrize(("bound", "level"), [(0.02, 0.05), (0.02, 0.025), (0.05, 0.05), (0.1, 0.1), (0.6, 0.05)])
def test_prompts_needed(bound: float, level: float) -> None:
    needed = prompts_needed(bound, level)
    assert betting_p_value([0.0] * needed, bound) <= level
    assert betting_p_value([0.0] * (needed - 1), bound) > level


def test_one_lost_prompt_is_recovered_from() -> None:
    assert betting_p_value([1.0, *[0.0] * 200], 0.1) < 1e-4


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan])
def test_what_is_no_loss_is_refused(loss: float) -> None:
    with pytest.raises(CalibrationError, match="losses lie between 0 and 1"):
        betting_p_value([0.0, loss], 0.02)


@pytest.mark.parametrize("bound", [0.0, 1.0, math.nan])
def test_what_is_no_bound_is_refused(bound: float) -> None:
    with pytest.raises(CalibrationError, match="give one above 0 and below 1"):
        BettingTest(bound)
