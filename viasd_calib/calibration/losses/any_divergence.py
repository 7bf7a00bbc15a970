"""Any divergence: whether the full verifier would have chosen another token anywhere."""

from __future__ import annotations

from viasd_calib.calibration.judging import JudgedPrompt
from viasd_calib.calibration.losses.base import register


@register(
    meaning="whether the full verifier would have chosen any token otherwise",
    claim="of prompts get a text that is not the full verifier's",
)
def any_divergence(judged: JudgedPrompt) -> float:
    """1 where a token of a prompt's turns diverges, else 0."""
    return float(judged.diverged.any())
