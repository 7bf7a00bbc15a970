"""Thresholds on a fitted gate: the project's own rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import SlimMasks, accept_by_score
from viasd_calib.decoding.features import RATIO_FEATURES, TRACED_TOP_K, DraftStatistics, slim_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.slim_rules.base import SlimRule, register
from viasd_calib.decoding.top_k import top_k_of
from viasd_calib.spec import Gates


@register
@dataclass(frozen=True)
class CalibratedRule(SlimRule):
    """Thresholds on a fitted gate's P(q's choice = token), one for drafted tokens and one for q's slim choices."""

    gate: Gate
    accept_at: float
    regenerate_at: float

    @classmethod
    def from_spec(cls, gates: Gates, device: torch.device | str = "cpu") -> Self:
        assert gates.slim is not None, "the spec demands it"
        assert gates.regenerate_at is not None, "the spec demands it"
        return cls(Gate(gates.slim, device), gates.accept_at, gates.regenerate_at)

    @property
    def draft_top(self) -> int:
        return TRACED_TOP_K if "draft_kl_slim" in self.gate.names else 1

    def masks(self, logits: Tensor, draft: DraftStatistics, pending: int) -> SlimMasks:
        drafted, choices = candidate_scores(self.gate, logits, draft, pending)
        return accept_by_score(drafted, choices, self.accept_at, self.regenerate_at)


def as_drafted(gate: Gate, choices: Tensor, log_ratio: Tensor) -> Tensor:
    """Features of drafted tokens from those of q's slim choices beside them, [k, features].

    At one place the two have every feature in common but those of the ratio.

    Args:
        choices: stacked for ``gate``, [k, features].
        log_ratio: log q'(drafted token) / max q', [k].
    """
    for name, feature in RATIO_FEATURES.items():
        choices = gate.with_feature(choices, name, feature(log_ratio))
    return choices


def candidate_scores(gate: Gate, logits: Tensor, draft: DraftStatistics, pending: int) -> tuple[Tensor, Tensor]:
    """Slim-gate scores of the k drafted tokens [k] and of q's slim choices [k + 1].

    Args:
        logits: q' at the k places of the block and after it, [k + 1, vocabulary].
        pending: tokens that wait for q before the block.
    """
    k = draft.tokens.shape[0]
    statistics = logit_statistics(logits, draft.tokens)
    slim = top_k_of(statistics, logits, 1)
    place = torch.arange(k + 1, device=logits.device)
    waiting = pending + place
    zeros = torch.zeros_like(slim.entropy)  # [k + 1]: log ratio of q's slim choice to itself
    inside = gate.stack(slim_features(zeros[:k], logits[:k], slim[:k], draft, place[:k], waiting[:k], gate.names))
    after = gate.stack(slim_features(zeros[k:], logits[k:], slim[k:], None, place[k:], waiting[k:], gate.names))
    drafted = as_drafted(gate, inside, statistics.log_ratio)  # [k, features]
    scores = gate.of_stacked(torch.cat([drafted, inside, after]))  # [2 k + 1]
    return scores[:k], scores[k:]
