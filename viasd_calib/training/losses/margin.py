"""The published cost of a slim verifier, which VIA-SD's search for a route lowers."""

from __future__ import annotations

import math

from torch import Tensor

from viasd_calib.training.losses.buckets import top_k_and_rest
from viasd_calib.training.losses.registry import training_loss

MARGIN_ALPHA = 0.5
"""alpha of the margin cost: the published alpha_1 of VIA-SD (arXiv 2606.12243)."""

MARGIN_BETA = 0.3
"""beta of the margin cost: the published alpha_2 of VIA-SD (arXiv 2606.12243)."""


@training_loss("margin")
def margin_cost(
    q_ids: Tensor, q_log_probs: Tensor, logits: Tensor, alpha: float = MARGIN_ALPHA, beta: float = MARGIN_BETA
) -> Tensor:
    """R = sum q' ReLU(log(1 - alpha) + log q' - log q) + sum q ReLU(log beta + log q' - log q), in nats.

    Over q's top k tokens and one bucket for all others; arXiv 2606.12243, which writes p for the slim verifier. It asks
    one thing of q', not to overstate tokens: where q' gives none more than min(1 / (1 - alpha), 1 / beta) times what q
    gives it, cost and gradient are 0.

    Args:
        q_ids: [places, k], long.
        q_log_probs: [places, k].
        logits: of q', [places, vocabulary].
        alpha: below 1; the first term begins at a ratio of 1 / (1 - alpha).
        beta: above 0; the second term begins at a ratio of 1 / beta.

    Returns:
        [places], not below 0.

    Example:
        >>> import torch
        >>> q_ids, q_log_probs = torch.tensor([[0]]), torch.tensor([[0.2]]).log()
        >>> slim = torch.tensor([[[0.3, 0.7]], [[0.8, 0.2]]]).log()  # a ratio of 1.5, and one of 4
        >>> [round(margin_cost(q_ids, q_log_probs, logits).item(), 4) for logits in slim]
        [0.0, 0.591]
    """
    q, slim = top_k_and_rest(q_ids, q_log_probs, logits)
    ratio = slim - q
    overstated = slim.exp() * (math.log1p(-alpha) + ratio).relu()
    improbable = q.exp() * (math.log(beta) + ratio).relu()
    return (overstated + improbable).sum(-1)
