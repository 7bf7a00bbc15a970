"""Overshoot: by how much the emitted tokens are more probable to the policy than to the full verifier."""

from __future__ import annotations

import math

from torch import Tensor

from viasd_calib.calibration.judging import JudgedPrompt
from viasd_calib.calibration.losses.base import register

MARGIN = math.log(2)
"""In nats: a token that q gives half of its choice's probability, or more, is no overshoot."""
CAP = math.log(100)
"""In nats beyond the margin: a larger overshoot counts as this one."""


def overshoots(judged: JudgedPrompt) -> Tensor:
    """The positive part of log proposal - log q beyond ``MARGIN``, capped at ``CAP`` and scaled: [tokens], in [0, 1].

    Calibration decodes greedily. Both distributions then have all of their mass on one token, and the ratio of the
    policy's token is 1 or infinite; what is left of it without that limit is by how much q prefers its own choice,
    log q(choice) - log q(token).
    """
    margin = max(MARGIN, judged.rounding_gap)
    return (judged.all_deficits - margin).clamp(0, CAP) / CAP


@register(
    meaning="mean overshoot of a text's tokens: log of the full verifier's choice over the token, beyond log 2, up to "
    "log 100, over log 100",
    claim="of the largest overshoot that counts, on average over the tokens of a text and over prompts, is how far "
    "tokens lie below the full verifier's choice",
)
def overshoot(judged: JudgedPrompt) -> float:
    """Mean over the tokens of a prompt's turns, in [0, 1]."""
    return float(overshoots(judged).mean())
