"""VIA-SD with fixed bands, repaired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.slim_rules.ratio import RatioRule
from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.spec import Audit, Decoding, Gates

REPAIRED_BANDS = RatioRule(accept_at=0.7, escalate_below=0.5)


@register(lossless=False)
@dataclass
class ViaSDFixed(ThreeTier):
    """VIA-SD with fixed bands on r = q'(v) / max q', repaired (arXiv 2606.12243).

    Accept at r >= 0.7, regenerate at 0.5 <= r < 0.7, escalate below: the published cuts 1 - alpha_2 = 0.7 and
    1 - alpha_1 = 0.5 the other way round, so that the middle band is not empty. No audit; lossy. When sampling, a
    drafted token in the upper two bands goes through the speculative step from p to q'.
    """

    rule: SlimRule | None = REPAIRED_BANDS
    audit: Audit = "off"

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls(draft_length=decoding.draft_length, max_pending=decoding.max_pending)
