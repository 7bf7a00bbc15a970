"""Kullback-Leibler divergence from q to q'."""

from __future__ import annotations

from torch import Tensor

from viasd_calib.decoding.features import top_k_kl
from viasd_calib.training.losses.registry import training_loss


@training_loss("kl")
def kl_divergence(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(q || q') = sum q (log q - log q') over q's top k tokens and one bucket for all others, in nats.

    The same function gives the divergence that searches minimise, that reports show and that gates look at
    (:func:`~viasd_calib.decoding.features.top_k_kl`).

    Args:
        q_ids: [places, k], long.
        q_log_probs: [places, k].
        logits: of q', [places, vocabulary].

    Returns:
        [places], at least 0; never above that of the whole distributions but for rounding.

    Example:
        >>> import torch
        >>> kl_divergence(torch.tensor([[1]]), torch.tensor([[0.5]]).log(), torch.zeros(1, 4))  # ln(2 / sqrt 3)
        tensor([0.1438])
    """
    return top_k_kl(q_ids, q_log_probs, logits, logits.logsumexp(-1))
