"""What training minimises, on q's traced top k."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["kl", "total_variation", "margin"]

MARGIN_ALPHA = 0.5
"""alpha of the margin cost: the published alpha_1 of VIA-SD (arXiv 2606.12243)."""

MARGIN_BETA = 0.3
"""beta of the margin cost: the published alpha_2 of VIA-SD (arXiv 2606.12243)."""


def top_k_and_rest(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of q and of a model for q's top k tokens, and for all others together.

    Args:
        q_ids: [places, k], long, no token twice in a row.
        q_log_probs: [places, k].
        logits: the model's, [places, vocabulary].

    Returns:
        q's and the model's, [places, k + 1] each; the last column is that of the others, at least log 1e-6.

    Example:
        >>> q, model = top_k_and_rest(torch.tensor([[1]]), torch.tensor([[0.5]]).log(), torch.zeros(1, 4))
        >>> q.exp().tolist(), model.exp().tolist()
        ([[0.5, 0.5]], [[0.25, 0.75]])
    """
    known = logits.gather(-1, q_ids) - logits.logsumexp(-1, keepdim=True)  # [places, k]
    q, model = (torch.cat([top, _log_rest(top)], -1) for top in (q_log_probs, known))
    return q, model


def _log_rest(log_probs: Tensor) -> Tensor:
    """Log of what some tokens ([places, k]) leave to all others: [places, 1]."""
    return (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()


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
    q, model = top_k_and_rest(q_ids, q_log_probs, logits)
    return (q.exp() * (q - model)).sum(-1)


def total_variation(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor) -> Tensor:
    """Total variation of q and a model over q's top k tokens and one bucket for all others.

    It is what speculative sampling rejects of one's proposals to the other: the chance of acceptance is 1 minus it
    (Leviathan, Kalman and Matias 2023, arXiv 2211.17192, section 3.2).

    Args:
        q_ids: [places, k], long.
        q_log_probs: [places, k].
        logits: the model's, [places, vocabulary].

    Returns:
        [places], from 0 to 1 but for rounding; never above that of the whole distributions.

    Example:
        >>> total_variation(torch.tensor([[1]]), torch.tensor([[0.5]]).log(), torch.zeros(1, 4)).tolist()
        [0.25]
    """
    q, model = top_k_and_rest(q_ids, q_log_probs, logits)
    return (q.exp() - model.exp()).abs().sum(-1) / 2


def margin_cost(
    q_ids: Tensor, q_log_probs: Tensor, logits: Tensor, alpha: float = MARGIN_ALPHA, beta: float = MARGIN_BETA
) -> Tensor:
    """The published cost of a slim verifier, over q's top k tokens and one bucket for all others, in nats.

    With q' the model, R = sum q' ReLU(log(1 - alpha) + log q' - log q) + sum q ReLU(log beta + log q' - log q): the
    cost that VIA-SD's search for a route lowers (arXiv 2606.12243, which writes p for the slim verifier). It asks one
    thing of q', not to overstate tokens: where q' gives none more than min(1 / (1 - alpha), 1 / beta) times what q
    gives it, cost and gradient are 0.

    Args:
        q_ids: [places, k], long.
        q_log_probs: [places, k].
        logits: the model's, [places, vocabulary].
        alpha: below 1; the first term begins at a ratio of 1 / (1 - alpha).
        beta: above 0; the second term begins at a ratio of 1 / beta.

    Returns:
        [places], not below 0.

    Example:
        >>> ids, said = torch.tensor([[0]]), torch.tensor([[0.2]]).log()
        >>> slim = torch.tensor([[[0.3, 0.7]], [[0.8, 0.2]]]).log()  # a ratio of 1.5, and one of 4
        >>> [round(margin_cost(ids, said, logits).item(), 4) for logits in slim]
        [0.0, 0.591]
    """
    q, model = top_k_and_rest(q_ids, q_log_probs, logits)
    ratio = model - q
    overstated = model.exp() * (math.log1p(-alpha) + ratio).relu()
    improbable = q.exp() * (math.log(beta) + ratio).relu()
    return (overstated + improbable).sum(-1)


OBJECTIVES: Mapping[Objective, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl": top_k_tail_kl,
    "total_variation": total_variation,
    "margin": margin_cost,
}
"""What a router can minimise: q's top ids and log-probabilities, and the logits of q', to [places]."""


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
