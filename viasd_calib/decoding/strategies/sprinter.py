"""SPRINTER: a classifier on the draft model alone decides when q is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from viasd_calib.decoding.gates import draft_gate
from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.errors import SpecError
from viasd_calib.spec import Audit, Decoding, Gates


@register(lossless=False)
@dataclass
class Sprinter(ThreeTier):
    """SPRINTER (arXiv 2502.04557): a classifier on the draft model alone decides when q is called.

    Leading drafted tokens with P(q's choice = token) >= ``draft_accept_at`` are accepted unverified; q is called for
    the first below it. No audit. When sampling, what is accepted is drawn from p; lossy.
    """

    rule: SlimRule | None = None
    draft_accept_at: float = 0.5
    audit: Audit = "off"

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        gate = draft_gate(gates, device)
        if gate is None:
            raise SpecError("sprinter needs a draft gate, the spec has none; fit one with viasd fit")
        return cls(draft_gate=gate, draft_length=decoding.draft_length, max_pending=decoding.max_pending)
