"""Learn-then-Test: which candidates keep a bound, with a stated confidence.

Angelopoulos et al. 2021, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control",
arXiv 2110.01052: Hoeffding-Bentkus p-values (section 3.1) and fixed-sequence testing (section 3.2.2),
both from MAPIE.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mapie.risk_control.fwer_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

PROCEDURE = "learn-then-test, hoeffding-bentkus, fixed sequence"


def p_value(losses: Sequence[float], bound: float) -> float:
    """P-value of "the expected loss exceeds ``bound``", from losses in [0, 1] of exchangeable prompts.

    Example:
        >>> round(p_value([0.0] * 149, 0.02), 4)
        0.0493
    """
    mean = float(np.mean(losses))
    return float(compute_hoeffding_bentkus_p_value(np.array([mean]), len(losses), [bound])[0, 0])


def best_p_value(losses: Sequence[float], n_prompts: int, bound: float) -> float:
    """The p-value if every prompt still to come were without loss."""
    return p_value([*losses, *([0.0] * (n_prompts - len(losses)))], bound)


def certified(p_values: Sequence[float], confidence: float) -> int:
    """How many leading candidates, most careful first, are certified together.

    Example:
        >>> certified([0.001, 0.04, 0.2, 0.01], 0.95)
        2
    """
    if not p_values:
        return 0
    return len(control_fwer(np.array(p_values), 1 - confidence, fwer_method="fixed_sequence"))
