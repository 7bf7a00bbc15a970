"""The tail of the overshoot: tokens that the full verifier finds far less probable than its choice."""

from __future__ import annotations

from viasd_calib.calibration.judging import JudgedPrompt
from viasd_calib.calibration.losses.base import register
from viasd_calib.calibration.losses.overshoot import overshoots


@register(
    meaning="share of a text's tokens whose overshoot is the largest that counts: 200 times less probable to the full "
    "verifier than its choice, or less still",
    claim="of a text's tokens, on average over prompts, are 200 times less probable to the full verifier than its own "
    "choice",
)
def overshoot_tail(judged: JudgedPrompt) -> float:
    """Share of the tokens of a prompt's turns, in [0, 1]."""
    return float((overshoots(judged) >= 1).float().mean())
