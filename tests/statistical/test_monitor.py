"""The monitor's test of a certified bound, looked at after each text: how often it is wrong, how soon it notices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from viasd_calib.calibration.betting import BettingTest
from viasd_calib.calibration.exceedance import ExceedanceTest

BOUND, LEVEL, TEXTS = 0.1, 0.05, 200
NEVER = 10**9

Losses = NDArray[np.float64]
Draw = Callable[[np.random.Generator, float, tuple[int, int]], Losses]


def zero_or_one(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Losses:
    """Whether a text diverges anywhere."""
    return (rng.random(shape) < mean).astype(float)


def shares(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Losses:
    """Shares of 64 tokens that diverge, with texts that differ (beta-binomial)."""
    weight = 1 / 0.05 - 1
    return rng.binomial(64, rng.beta(mean * weight, (1 - mean) * weight, shape)) / 64


DRAWS = [zero_or_one, shares]


class PeekingTest:
    """A fixed-n p-value (exact, binomial), asked after every text as if there had been no looks before."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.texts = self.lost = 0
        self.p_value = 1.0

    def add(self, loss: float) -> None:
        """One more text."""
        self.texts += 1
        self.lost += round(loss)
        self.p_value = float(binom.sf(self.lost - 1, self.texts, self.bound))


class MirroredTest(BettingTest):
    """The calibration's test by betting, of 1 - loss against 1 - bound."""

    def __init__(self, bound: float) -> None:
        super().__init__(1 - bound)

    def add(self, loss: float) -> None:
        """One more text."""
        super().add(1 - loss)


AnyTest = Callable[[float], ExceedanceTest | PeekingTest | MirroredTest]


def alarm(kind: AnyTest, losses: Losses, bound: float = BOUND) -> int:
    """Number of the text at which a test calls the bound exceeded; ``NEVER`` where it does not."""
    test = kind(bound)
    for number, loss in enumerate(losses.tolist(), 1):
        test.add(loss)
        if test.p_value <= LEVEL:
            return number
    return NEVER


def alarms(kind: AnyTest, draw: Draw, mean: float, runs: int, seed: int) -> NDArray[np.int64]:
    """The same for so many streams of ``TEXTS`` texts."""
    losses = draw(np.random.default_rng(seed), mean, (runs, TEXTS))
    return np.array([alarm(kind, stream) for stream in losses])


def limit(runs: int) -> float:
    """The level and three standard errors: exceeded by chance in 1 of 700 tests at most."""
    return LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / runs)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_bound_that_holds_is_called_exceeded_as_rarely_as_promised(draw: Draw) -> None:
    """2,000 streams whose mean loss is the bound, looked at after each of 200 texts."""
    wrong = float((alarms(ExceedanceTest, draw, BOUND, 2000, seed=0) < NEVER).mean())
    assert 0.1 * LEVEL < wrong <= limit(2000)


def test_peeking_with_a_fixed_n_test_is_seen() -> None:
    """The negative control: a test of level 0.05 at each text is wrong in more than a fifth of the streams."""
    assert float((alarms(PeekingTest, zero_or_one, BOUND, 300, seed=1) < NEVER).mean()) > max(limit(300), 0.2)


@pytest.mark.parametrize(("draw", "power", "median"), [(zero_or_one, 0.917, 68), (shares, 1.0, 9)])
def test_twice_the_bound_is_noticed(draw: Draw, power: float, median: int) -> None:
    """Within 200 texts, as often and as soon as in 2,000 streams of another seed.

    300 streams fall short of ``power`` less three standard errors by chance in 1 of 700 tests at most.
    """
    found = alarms(ExceedanceTest, draw, 2 * BOUND, 300, seed=2)
    assert (found < NEVER).mean() >= power - 3 * math.sqrt(power * (1 - power) / 300)
    assert np.median(found) <= 1.3 * median
    assert (alarms(ExceedanceTest, draw, BOUND / 2, 100, seed=3) < NEVER).mean() <= limit(100)


def test_it_notices_sooner_than_other_tests() -> None:
    """Losses of 0 or 1 of twice a bound of 0.2, in 40 streams: in half of the texts that the others take, or fewer.

    The others: the calibration's own test, mirrored, and the limit that MAPIE's ``RiskMonitoring`` compares with the
    bound, at half of the level, as it does.
    """
    bounds = pytest.importorskip("mapie.exchangeability_testing.bounds", reason="MAPIE before 1.6 has no such limit")
    streams = zero_or_one(np.random.default_rng(4), 0.4, (40, 300))

    def by_limit(losses: Losses) -> int:
        limits = bounds.conjugate_mixture_empirical_bernstein_bound(
            losses, v_opt=1, alpha=LEVEL / 2, bound_side="lower"
        )
        above = np.flatnonzero(np.asarray(limits) > 0.2)
        return int(above[0]) + 1 if len(above) else NEVER

    own = np.median([alarm(ExceedanceTest, losses, 0.2) for losses in streams])
    assert own <= 0.5 * np.median([alarm(MirroredTest, losses, 0.2) for losses in streams])
    assert own <= 0.5 * np.median([by_limit(losses) for losses in streams])
