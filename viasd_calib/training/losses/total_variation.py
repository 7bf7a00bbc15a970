"""Total variation of q and q': the rate at which speculative sampling rejects one's proposals to the other."""

from __future__ import annotations

from torch import Tensor

from viasd_calib.training.losses.buckets import top_k_and_rest
from viasd_calib.training.losses.registry import training_loss


@training_loss("total_variation")
def total_variation(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor) -> Tensor:
    """TV(q, q') = 1/2 sum |q - q'| over q's top k tokens and one bucket for all others.

    Speculative sampling accepts one's proposal to the other with a chance of 1 minus it (Leviathan, Kalman and Matias
    2023, arXiv 2211.17192, section 3.2).

    Args:
        q_ids: [places, k], long.
        q_log_probs: [places, k].
        logits: of q', [places, vocabulary].

    Returns:
        [places], from 0 to 1 but for rounding; never above that of the whole distributions.

    Example:
        >>> import torch
        >>> total_variation(torch.tensor([[1]]), torch.tensor([[0.5]]).log(), torch.zeros(1, 4)).tolist()
        [0.25]
    """
    q, slim = top_k_and_rest(q_ids, q_log_probs, logits)
    return (q.exp() - slim.exp()).abs().sum(-1) / 2
