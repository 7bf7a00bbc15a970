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

from viasd_calib.decoding.features import DraftSaid, slim_features
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.policies import Trust, trust_margin, trust_ratio, trust_scores
from viasd_calib.decoding.summary import Summary, summarize


class SlimRule(ABC):
    """Says where the slim tier may decide."""

    sees_draw: ClassVar[bool] = False
    """Whether ``Trust.own`` hangs on the drafted token itself. Such a rule cannot keep a sampled text's
    distribution, and is refused where it would have to."""

    @abstractmethod
    def trust(self, logits: Tensor, said: DraftSaid, pending: int) -> Trust:
        """What q' may decide of a block of k drafted tokens.

        ``own`` at a place must follow from the rows up to that place alone: later rows have seen the token that
        is drawn there, and a sampled text would no longer be q's.

        Args:
            logits: q' at the k places of the block and behind it, [k + 1, vocabulary].
            said: what the draft model said.
            pending: tokens that wait for q before the block.
        """


@dataclass(frozen=True)
class CalibratedRule(SlimRule):
    """Bounds on a fitted gate's P(q's choice = token); the project's own rule."""

    gate: Gate
    accept_at: float
    regenerate_at: float

    def trust(self, logits: Tensor, said: DraftSaid, pending: int) -> Trust:
        place = torch.arange(logits.shape[0], device=logits.device)
        accept, own = candidate_scores(self.gate, logits, summarize(logits, 2), said, place, pending + place)
        return trust_scores(accept, own, self.accept_at, self.regenerate_at)


@dataclass(frozen=True)
class RatioRule(SlimRule):
    """VIA-SD's bands on r = q'(v) / max q' (arXiv 2606.12243)."""

    sees_draw: ClassVar[bool] = True
    accept_at: float
    escalate_below: float

    def trust(self, logits: Tensor, said: DraftSaid, pending: int) -> Trust:
        inside = logits[:-1].float()  # [k, vocabulary]
        own = inside.gather(-1, said.tokens[:, None])[:, 0]  # [k]
        return trust_ratio(own - inside.amax(-1), self.accept_at, self.escalate_below)


@dataclass(frozen=True)
class MarginRule(SlimRule):
    """TriSpec's margin of q's two likeliest tokens, in probability (arXiv 2601.23180, lambda = 0.5)."""

    least: float = 0.5

    def trust(self, logits: Tensor, said: DraftSaid, pending: int) -> Trust:
        top = logits.float().softmax(-1).topk(2).values  # [k + 1, 2]
        return trust_margin(said.tokens, logits.argmax(-1), top[:, 0] - top[:, 1], self.least)


def candidate_scores(
    gate: Gate, logits: Tensor, slim: Summary, said: DraftSaid, place: Tensor, pending: Tensor
) -> tuple[Tensor, Tensor]:
    """Slim-gate scores of the k drafted tokens [k] and of q's slim choices [k + 1].

    Args:
        logits: q' at the k places of the block and behind it, [k + 1, vocabulary].
        slim: their summary.
        place: place in the block, [k + 1].
        pending: tokens since the last decided one, [k + 1].
    """
    k = said.tokens.shape[0]
    inside, behind = slim[:k], slim[k:]
    accept = gate(slim_features(said.tokens, logits[:k], inside, said, place[:k], pending[:k]))
    own = gate(slim_features(inside.ids[:, 0], logits[:k], inside, said, place[:k], pending[:k]))
    last = gate(slim_features(behind.ids[:, 0], logits[k:], behind, None, place[k:], pending[k:]))
    return accept, torch.cat([own, last])
