"""What training minimises, on q's traced top k."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_k_tail_kl(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(q || model) over q's top k tokens and one bucket for all others, in nats.

    Args:
        q_ids: [places, k], long.
        q_log_probs: [places, k].
        logits: the model's, [places, vocabulary].

    Returns:
        [places], not below 0 but for rounding.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0, -1.0]])
        >>> kl = top_k_tail_kl(torch.tensor([[0, 1]]), logits.log_softmax(-1)[:, :2], logits)
        >>> bool(kl.abs() < 1e-5)
        True
    """
    log_sum_exp = logits.logsumexp(-1, keepdim=True)  # [places, 1]
    model = logits.gather(-1, q_ids) - log_sum_exp  # [places, k]
    probs = q_log_probs.exp()
    inside = (probs * (q_log_probs - model)).sum(-1)
    rest = (1 - probs.sum(-1)).clamp(min=1e-6)
    model_rest = (1 - model.exp().sum(-1)).clamp(min=1e-6)
    return inside + rest * (rest.log() - model_rest.log())


def margin_cost(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """What VIA-SD's route search minimises (arXiv 2606.12243), over q's top k tokens.

    sum q' ReLU(log(1 - alpha) + log q' - log q) + sum q ReLU(log beta + log q' - log q): nothing is paid where
    q' is at most 1 / (1 - alpha) times q, or at most 1 / beta times q. Traces hold q's top k alone, so the sums leave
    out what q' gives to other tokens.

    Args:
        q_ids: q's top k tokens, [places, k], long.
        q_log_probs: [places, k].
        logits: of q', [places, vocabulary].
        alpha: margin that q' may stand above q, weighed by q'.
        beta: margin that q' may stand above q, weighed by q.

    Returns:
        [places], not below 0.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> ids = torch.tensor([[0, 1]])
        >>> margin_cost(ids, logits.log_softmax(-1)[:, :2], logits).item()
        0.0
        >>> margin_cost(ids, torch.tensor([[0.2, 0.7]]).log(), logits).item() > 0.5
        True
    """
    slim = logits.gather(-1, q_ids) - logits.logsumexp(-1, keepdim=True)  # [places, k]
    above = slim - q_log_probs
    by_slim = slim.exp() * (math.log(1 - alpha) + above).relu()
    by_full = q_log_probs.exp() * (math.log(beta) + above).relu()
    return (by_slim + by_full).sum(-1)


def restricted_cross_entropy(q_places: Tensor, q_log_probs: Tensor, logits: Tensor, hard_share: float) -> Tensor:
    """Cross entropy of a model with a reduced vocabulary to q: its distribution and its choice, mixed.

    Args:
        q_places: q's top k tokens as places in the reduced vocabulary, -1 for those outside, [places, k].
        q_log_probs: [places, k].
        logits: [places, reduced vocabulary].
        hard_share: weight of q's choice alone; the rest weighs its distribution.

    Returns:
        [places]; 0 where the reduced vocabulary holds none of q's tokens.
    """
    known = q_places >= 0  # [places, k]
    log_probs = logits.log_softmax(-1).gather(-1, q_places.clamp(min=0))  # [places, k]
    soft = torch.where(known, q_log_probs.exp(), 0.0)
    hard = torch.zeros_like(soft)
    hard[:, 0] = known[:, 0].float()
    target = hard_share * hard + (1 - hard_share) * soft
    return -(target * log_probs).sum(-1)
