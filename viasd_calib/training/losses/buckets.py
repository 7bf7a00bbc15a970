"""The tokens that losses compare two distributions on: q's top k, and all others as one."""

from __future__ import annotations

import torch
from torch import Tensor

from viasd_calib.decoding.features import LEAST_MASS


def top_k_and_rest(q_ids: Tensor, q_log_probs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of q and of a model for q's top k tokens, and for all others together.

    Args:
        q_ids: [places, k], long, no token twice in a row.
        q_log_probs: [places, k].
        logits: the model's, [places, vocabulary].

    Returns:
        q's and the model's, [places, k + 1] each; the last column is that of the others, at least log ``LEAST_MASS``.

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
    return (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_MASS).log()
