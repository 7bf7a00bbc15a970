"""Token divergence: the share of emitted tokens that the full verifier would not have chosen."""

from __future__ import annotations

from viasd_calib.calibration.judging import JudgedPrompt
from viasd_calib.calibration.losses.base import register


@register(
    meaning="share of a text's tokens the full verifier would not have chosen",
    claim="of a text's tokens, on average over prompts, are not what the full verifier would have chosen",
)
def token_divergence(judged: JudgedPrompt) -> float:
    """Diverged tokens over emitted tokens of a prompt's turns, in [0, 1]."""
    return float(judged.diverged.float().mean())
