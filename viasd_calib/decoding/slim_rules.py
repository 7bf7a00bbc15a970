"""Rules of the slim tier: where q' may decide, from what p and q' say of a block.

A new rule is a subclass of :class:`SlimRule` given to
:class:`viasd_calib.decoding.rounds.ThreeTier`; nothing else needs to know of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from viasd_calib.decoding.acceptance import Trust, trust_margin, trust_ratio, trust_scores
from viasd_calib.decoding.features import TRACED_TOP_K, DraftStatistics, slim_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.top_k import top_k_of


class SlimRule(ABC):
    """Says where the slim tier may decide."""

    sees_draw: ClassVar[bool] = False
    """Whether ``Trust.own`` hangs on the drafted token itself. Such a rule cannot keep a sampled text's
    distribution, and is refused where it would have to."""

    @property
    def draft_top(self) -> int:
        """How many of the draft model's likeliest tokens the rule looks at; 0 where it asks nothing of its logits."""
        return 1

    @abstractmethod
    def trust(self, logits: Tensor, said: DraftStatistics, pending: int) -> Trust:
        """What q' may decide of a block of k drafted tokens.

        ``own`` at a place must follow from the rows up to that place alone: later rows have seen the token that
        is drawn there, and a sampled text would no longer be q's.

        Args:
            logits: q' at the k places of the block and after it, [k + 1, vocabulary].
            said: what the draft model said.
            pending: tokens that wait for q before the block.
        """


@dataclass(frozen=True)
class CalibratedRule(SlimRule):
    """Bounds on a fitted gate's P(q's choice = token); the project's own rule."""

    gate: Gate
    accept_at: float
    regenerate_at: float

    @property
    def draft_top(self) -> int:
        return TRACED_TOP_K if "draft_kl_slim" in self.gate.names else 1

    def trust(self, logits: Tensor, said: DraftStatistics, pending: int) -> Trust:
        accept, own = candidate_scores(self.gate, logits, said, pending)
        return trust_scores(accept, own, self.accept_at, self.regenerate_at)


@dataclass(frozen=True)
class RatioRule(SlimRule):
    """VIA-SD's bands on r = q'(v) / max q' (arXiv 2606.12243)."""

    sees_draw: ClassVar[bool] = True
    accept_at: float
    escalate_below: float

    @property
    def draft_top(self) -> int:
        return 0

    def trust(self, logits: Tensor, said: DraftStatistics, pending: int) -> Trust:
        inside = logits[:-1].float()  # [k, vocabulary]
        own = inside.gather(-1, said.tokens[:, None])[:, 0]  # [k]
        return trust_ratio(own - inside.amax(-1), self.accept_at, self.escalate_below)


@dataclass(frozen=True)
class MarginRule(SlimRule):
    """TriSpec's margin of q's two likeliest tokens, in probability (arXiv 2601.23180, lambda = 0.5)."""

    least: float = 0.5

    def trust(self, logits: Tensor, said: DraftStatistics, pending: int) -> Trust:
        reading = logit_statistics(logits)
        margin = reading.log_top1.exp() - (reading.second - reading.log_sum_exp).exp()  # [k + 1]
        return trust_margin(said.tokens, reading.argmax, margin, self.least)


def candidate_scores(gate: Gate, logits: Tensor, said: DraftStatistics, pending: int) -> tuple[Tensor, Tensor]:
    """Slim-gate scores of the k drafted tokens [k] and of q's slim choices [k + 1].

    Args:
        logits: q' at the k places of the block and after it, [k + 1, vocabulary].
        pending: tokens that wait for q before the block.
    """
    k = said.tokens.shape[0]
    reading = logit_statistics(logits, said.tokens)
    slim = top_k_of(reading, logits, 1)
    place = torch.arange(k + 1, device=logits.device)
    waiting = pending + place
    own_ratio = torch.zeros_like(slim.entropy)  # [k + 1]
    inside = slim_features(own_ratio[:k], logits[:k], slim[:k], said, place[:k], waiting[:k], gate.names)
    after = slim_features(own_ratio[k:], logits[k:], slim[k:], None, place[k:], waiting[k:], gate.names)
    # At one place q's choice and the drafted token have every feature in common but this.
    apart = slim_features(reading.log_ratio, logits[:k], slim[:k], said, place[:k], waiting[:k], ["log_ratio"])
    return gate(inside | apart), torch.cat([gate(inside), gate(after)])
