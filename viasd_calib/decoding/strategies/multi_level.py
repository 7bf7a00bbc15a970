"""Multi-level speculative decoding: q' drafts for q, and is itself drafted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.slim_rules.margin import MarginRule
from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.spec import Decoding, Gates

SLIM_DECIDES_ALL = MarginRule(0.0)


@register(lossless=True)
@dataclass
class MultiLevel(ThreeTier):
    """ML-SpecQD's rule (arXiv 2503.13565): q' decides everything until q checks. Lossless.

    q' verifies the draft model's tokens by the ordinary speculative rule, and adds its own token after them; when
    ``max_pending`` leaves no room for a further block, q verifies all pending tokens in one pass, strictly. No gate,
    no margin: what ``three_tier`` gains over it is what gates are worth. As in ``three_tier``, q's pass takes a fresh
    drafted block along.
    """

    rule: SlimRule | None = SLIM_DECIDES_ALL

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls(draft_length=decoding.draft_length, max_pending=decoding.max_pending)
