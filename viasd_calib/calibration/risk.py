"""Learn-then-Test: which candidates keep a bound, with a stated confidence.

Angelopoulos et al. 2021, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control",
arXiv 2110.01052: fixed-sequence testing (section 3.2.2), from MAPIE, of p-values that come from a test by betting
(:mod:`viasd_calib.calibration.betting`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mapie.risk_control.fwer_control import control_fwer

PROCEDURE = "learn-then-test: prompts in the order of their hashes, betting (GRAPA on 50 bets), fixed sequence"
"""All that decides the outcome besides the losses; named, and fixed before a prompt is decoded."""


def certified(p_values: Sequence[float], level: float) -> int:
    """How many leading candidates, most careful first, are certified together.

    Args:
        level: probability with which one of them may be certified though its expected loss is larger.

    Example:
        >>> certified([0.001, 0.04, 0.2, 0.01], 0.05)
        2
    """
    if not p_values:
        return 0
    return len(control_fwer(np.array(p_values), level, fwer_method="fixed_sequence"))
