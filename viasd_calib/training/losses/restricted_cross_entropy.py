"""Cross entropy of a drafter that has fewer output tokens than q."""

from __future__ import annotations

import torch
from torch import Tensor


def restricted_cross_entropy(q_places: Tensor, q_log_probs: Tensor, logits: Tensor, hard_share: float) -> Tensor:
    """- sum t log p, with t = h [token is q's choice] + (1 - h) q over q's top k tokens in a reduced vocabulary.

    Args:
        q_places: q's top k tokens as places in the reduced vocabulary, -1 for those outside, [places, k].
        q_log_probs: [places, k].
        logits: of p, [places, reduced vocabulary].
        hard_share: h, the weight of q's choice alone, 0 to 1.

    Returns:
        [places], in nats, not below 0; 0 where the reduced vocabulary holds none of q's tokens.

    Example:
        >>> places, log_probs = torch.tensor([[1, -1], [-1, -1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        >>> loss = restricted_cross_entropy(places, log_probs, torch.zeros(2, 4), hard_share=1.0)  # ln 4, and nothing
        >>> [round(value, 4) for value in loss.abs().tolist()]
        [1.3863, 0.0]
    """
    known = q_places >= 0  # [places, k]
    log_probs = logits.log_softmax(-1).gather(-1, q_places.clamp(min=0))  # [places, k]
    soft = torch.where(known, q_log_probs.exp(), 0.0)
    hard = torch.zeros_like(soft)
    hard[:, 0] = known[:, 0].float()
    target = hard_share * hard + (1 - hard_share) * soft
    return -(target * log_probs).sum(-1)
