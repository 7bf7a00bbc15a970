"""A test by betting that losses have come to exceed a bound: it may be looked at after each text, for ever.

Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", arXiv 2010.09686: whoever
thinks that the expected loss lies above a bound bets on it, text by text, with the capital shared among several bets
(their grid Kelly). If each text's expected loss, given the texts before it, is at most the bound, the capital is a
nonnegative supermartingale from 1: an e-value after each text. By Ville's inequality it ever comes to 1 / alpha with a
probability of at most alpha.

:class:`~viasd_calib.calibration.betting.BettingTest` with 1 - bound and 1 - loss would test the same. But its bet is
the best one so far, and the largest of equally good ones: nearly all of the capital on a loss above the bound at the
first text, and most texts have none. MAPIE's ``RiskMonitoring`` (1.6) compares the bound with a lower confidence limit,
an empirical Bernstein bound by conjugate mixture, at half of its level: it needs several times as many texts
(``tests/statistical/test_monitor.py`` compares the three).
"""

from __future__ import annotations

import math

import numpy as np

from viasd_calib.calibration.betting import check_bound, check_loss
from viasd_calib.spec import LARGEST_BET

BETS = 20
"""Bets that share the capital."""
LARGEST_LOG = 700.0
"""Logs of capitals are cut here: what is larger is no float."""


class ExceedanceTest:
    """Tests "the expected loss is at most ``bound``", one text after the other.

    The capital is the mean of ``BETS`` capitals, each multiplied by 1 + b (loss - bound) with each text. The bets b are
    fixed: in a geometric series from 1 / 2, which wins on losses of 0 and 1 little above the bound, to
    ``LARGEST_BET / bound``, which wins fast on losses that hardly differ. So the capital is at least 1 / ``BETS`` of
    that of the best of them.

    Args:
        bound: between 0 and 1, neither included.

    Example:
        >>> test = ExceedanceTest(0.02)
        >>> for loss in [0.0, 0.04, 0.06, 0.02] * 20:
        ...     test.add(loss)
        >>> round(test.p_value, 4)
        0.0018
        >>> for loss in [0.0] * 40:
        ...     test.add(loss)
        >>> round(test.p_value, 4), round(test.e_value, 2)  # the largest capital stays what it was
        (0.0018, 0.47)
    """

    def __init__(self, bound: float) -> None:
        check_bound(bound)
        self._bound = bound
        self._bets = np.geomspace(0.5, LARGEST_BET / bound, BETS)  # [bets]
        self._logs = np.zeros(BETS)  # [bets]: log capital of each
        self._log_largest = 0.0

    def add(self, loss: float) -> None:
        """See the loss of one more text.

        Raises:
            CalibrationError: a loss outside [0, 1].
        """
        check_loss(loss)
        self._logs += np.log1p(self._bets * (loss - self._bound))
        self._log_largest = max(self._log_largest, self._log_capital)

    @property
    def _log_capital(self) -> float:
        return float(np.logaddexp.reduce(self._logs)) - math.log(BETS)

    @property
    def e_value(self) -> float:
        """The capital after all losses so far."""
        return math.exp(min(self._log_capital, LARGEST_LOG))

    @property
    def largest_e_value(self) -> float:
        """The largest capital so far, 1 at least."""
        return math.exp(min(self._log_largest, LARGEST_LOG))

    @property
    def p_value(self) -> float:
        """1 / the largest capital so far: at most alpha after any text with a probability of at most alpha."""
        return math.exp(-self._log_largest)
