"""VIA-SD with the published constants."""

from __future__ import annotations

from dataclasses import dataclass
from math import nextafter

from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.slim_rules.ratio import RatioRule
from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.via_sd_fixed import ViaSDFixed

PUBLISHED_BANDS = RatioRule(accept_at=0.5, escalate_below=nextafter(0.5, 0))


@register(lossless=False)
@dataclass
class ViaSDPublished(ViaSDFixed):
    """VIA-SD with the published constants as they are (arXiv 2606.12243): alpha_1 = 0.5, alpha_2 = 0.3.

    Accept at r >= 1 - alpha_1 = 0.5, escalate at r < 1 - alpha_2 = 0.7: the regenerate band is empty, and what
    is accepted is accepted first. No audit; lossy. When sampling, a drafted token above the cut goes through the
    speculative step from p to q'.
    """

    rule: SlimRule | None = PUBLISHED_BANDS
