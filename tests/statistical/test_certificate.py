"""The certificate holds as often as it says: simulated losses, no model."""

from __future__ import annotations

import numpy as np
import pytest

from viasd_calib.calibration.risk import best_p_value, certified, p_value
from viasd_calib.spec import prompts_needed

BOUND, CONFIDENCE, REPEATS = 0.05, 0.9, 1500


def run_once(rng: np.random.Generator, means: list[float], n_prompts: int) -> int:
    """Test candidates with beta-distributed losses of the given means, as ``certify`` does; how many are certified."""
    p_values: list[float] = []
    for mean in means:
        losses: list[float] = rng.beta(2 * mean, 2 * (1 - mean), n_prompts).tolist()
        given_up = any(
            best_p_value(losses[:seen], n_prompts, BOUND) > 1 - CONFIDENCE for seen in range(1, n_prompts, 20)
        )
        p_values.append(1.0 if given_up else p_value(losses, BOUND))
        if p_values[-1] > 1 - CONFIDENCE:
            break
    return certified(p_values, CONFIDENCE)


def test_a_false_certificate_is_as_rare_as_promised() -> None:
    """The first two candidates keep the bound, the third just does not: it may pass in 10 % of runs.

    1,500 runs: a share above 0.1 + 4 standard errors (0.131) is a failure; false alarms below 1 in 10,000.
    """
    rng = np.random.default_rng(0)
    wrong = sum(run_once(rng, [0.005, 0.02, 0.0501], 200) > 2 for _ in range(REPEATS))
    assert wrong / REPEATS < (1 - CONFIDENCE) + 4 * (CONFIDENCE * (1 - CONFIDENCE) / REPEATS) ** 0.5


def test_the_test_has_power() -> None:
    """A careful candidate is nearly always certified, so that the control above is not empty."""
    rng = np.random.default_rng(1)
    assert sum(run_once(rng, [0.005], 200) == 1 for _ in range(200)) > 190


def test_a_procedure_that_looks_at_the_mean_alone_would_fail() -> None:
    """The check can fail: certifying whenever the mean is below the bound errs in about half of the runs."""
    rng = np.random.default_rng(2)
    means = [rng.beta(0.1002, 1.8998, 200).mean() for _ in range(REPEATS)]
    assert np.mean(np.array(means) < BOUND) > 0.3


@pytest.mark.parametrize(("bound", "confidence"), [(0.02, 0.95), (0.05, 0.95), (0.1, 0.9)])
def test_prompts_needed(bound: float, confidence: float) -> None:
    needed = prompts_needed(bound, confidence)
    assert p_value([0.0] * needed, bound) <= 1 - confidence
    assert p_value([0.0] * (needed - 1), bound) > 1 - confidence
