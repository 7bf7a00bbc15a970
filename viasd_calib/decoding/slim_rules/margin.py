"""TriSpec's margin between the two most likely tokens of q'."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from viasd_calib.decoding.acceptance import SlimMasks, accept_by_margin
from viasd_calib.decoding.features import DraftStatistics
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.slim_rules.base import SlimRule, register


@register
@dataclass(frozen=True)
class MarginRule(SlimRule):
    """TriSpec's margin of q's two most likely tokens, in probability (arXiv 2601.23180, lambda = 0.5).

    Attributes:
        least: the paper's lambda, in [0, 1]; above 1 q' decides nothing.
    """

    least: float = 0.5

    def masks(self, logits: Tensor, draft: DraftStatistics, pending: int) -> SlimMasks:
        statistics = logit_statistics(logits)
        margin = statistics.log_top1.exp() - (statistics.second - statistics.log_sum_exp).exp()  # [k + 1]
        return accept_by_margin(draft.tokens, statistics.argmax, margin, self.least)
