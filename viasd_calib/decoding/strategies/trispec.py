"""TriSpec: the margin of q' decides who verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.slim_rules.margin import MarginRule
from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.spec import Audit, Decoding, Gates

PUBLISHED_RULE = MarginRule(0.5)


@register(lossless=False)
@dataclass
class TriSpec(ThreeTier):
    """TriSpec (arXiv 2601.23180): q' decides where its two most likely tokens are far enough apart, else q.

    Published lambda = 0.5, the margin of probability. No audit. When sampling, what q' decides is drawn from q'; lossy.
    """

    rule: SlimRule | None = PUBLISHED_RULE
    audit: Audit = "off"

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls(draft_length=decoding.draft_length, max_pending=decoding.max_pending)
