"""VIA-SD's bands on a ratio of probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import SlimMasks, accept_by_ratio
from viasd_calib.decoding.features import DraftStatistics
from viasd_calib.decoding.slim_rules.base import SlimRule, register
from viasd_calib.spec import Gates


@register
@dataclass(frozen=True)
class RatioRule(SlimRule):
    """VIA-SD's bands on r = q'(v) / max q' (arXiv 2606.12243), 0 < r <= 1: see :func:`accept_by_ratio`."""

    sees_draw: ClassVar[bool] = True
    accept_at: float
    escalate_below: float

    @classmethod
    def from_spec(cls, gates: Gates, device: torch.device | str = "cpu") -> Self:
        assert gates.escalate_below is not None, "the spec demands it"
        return cls(gates.accept_at, gates.escalate_below)

    @property
    def draft_top(self) -> int:
        return 0

    def masks(self, logits: Tensor, draft: DraftStatistics, pending: int) -> SlimMasks:
        inside = logits[:-1].float()  # [k, vocabulary]
        drafted = inside.gather(-1, draft.tokens[:, None])[:, 0]  # [k]
        return accept_by_ratio(drafted - inside.amax(-1), self.accept_at, self.escalate_below)
