"""A test by betting: a p-value that holds after each prompt, however many are still to come.

Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", arXiv 2010.09686: whoever
thinks that the expected loss lies below a bound bets on it, prompt by prompt. If it does not, the capital is a
nonnegative supermartingale, and by Ville's inequality it ever comes to 1 / alpha with a probability of at most alpha.
The bets are theirs by "growth rate adaptive to the particular alternative" (GRAPA, appendix B), on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from viasd_calib.errors import CalibrationError
from viasd_calib.spec import LARGEST_BET

STEPS = 50
"""Bets above 0 that are compared."""
TIE = 1e-9
"""Growths that differ by less are equal: the larger bet is taken, on every machine."""


def check_bound(bound: float) -> None:
    """Refuse a bound that no test can be of.

    Raises:
        CalibrationError: it does not lie between 0 and 1, neither included.
    """
    if not 0 < bound < 1:
        raise CalibrationError(f"a loss bound of {bound} cannot be tested; give one above 0 and below 1")


def check_loss(loss: float) -> None:
    """Refuse a loss that no test can be of.

    Raises:
        CalibrationError: it lies outside [0, 1].
    """
    if not 0 <= loss <= 1:
        raise CalibrationError(f"a loss of {loss} cannot be tested; losses lie between 0 and 1")


class BettingTest:
    """Tests "the expected loss is at least ``bound``", one prompt after the other.

    Before prompt t a bet b_t is fixed, between 0 and ``LARGEST_BET / (1 - bound)``: the one by which capital would
    have grown most on the losses so far (the largest of equal ones, so at first the largest of all). The capital is
    then multiplied by 1 + b_t (bound - loss_t). The p-value is 1 / the largest capital so far, 1 at most.

    It holds for prompts that are exchangeable *in the order in which they come*: not where a file is sorted by task.

    Args:
        bound: between 0 and 1, neither included.

    Example:
        >>> test = BettingTest(0.02)
        >>> for loss in [0.0] * 185:
        ...     test.add(loss)
        >>> round(test.p_value, 4)
        0.0247
        >>> test.add(1.0)  # the largest capital stays what it was
        >>> round(test.p_value, 4)
        0.0247
    """

    def __init__(self, bound: float) -> None:
        check_bound(bound)
        self._bound = bound
        self._bets = np.linspace(0, 1, STEPS + 1) * LARGEST_BET / (1 - bound)  # [bets], rising
        self._growth = np.zeros_like(self._bets)  # [bets]: log capital had each been made from the first prompt on
        self._log_capital = 0.0
        self._log_largest = 0.0

    def add(self, loss: float) -> None:
        """Bet on one more prompt, and see its loss.

        Raises:
            CalibrationError: a loss outside [0, 1].
        """
        check_loss(loss)
        bet = int(np.flatnonzero(self._growth >= self._growth.max() - TIE)[-1])
        growth = np.log1p(self._bets * (self._bound - loss))  # [bets]
        self._growth += growth
        self._log_capital += float(growth[bet])
        self._log_largest = max(self._log_largest, self._log_capital)

    @property
    def p_value(self) -> float:
        """Of all losses so far."""
        return math.exp(-self._log_largest)

    def least_p_value(self, prompts: int) -> float:
        """What the p-value can come down to with so many prompts more: with the largest bet, and without a loss."""
        best = self._log_capital + prompts * math.log1p(float(self._bets[-1]) * self._bound)
        return math.exp(-max(self._log_largest, best))


def betting_p_value(losses: Iterable[float], bound: float) -> float:
    """P-value of "the expected loss is at least ``bound``", from losses in [0, 1] in the order they were tested.

    Raises:
        CalibrationError: a bound that is not between 0 and 1, or a loss outside [0, 1].

    Example:
        >>> round(betting_p_value([0.0, 0.04, 0.0] * 100, 0.05), 6)
        1.4e-05
    """
    test = BettingTest(bound)
    for loss in losses:
        test.add(loss)
    return test.p_value
