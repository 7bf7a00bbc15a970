"""Top-k statistics of a model's distributions: written to traces, read by gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from viasd_calib.decoding.kernels import LogitStatistics, logit_statistics
from viasd_calib.draft.base import to_verifier_ids


@dataclass(frozen=True)
class TopKStatistics:
    """Scalars and the top k of distributions; every field has the logits' leading shape.

    Attributes:
        ids: verifier ids of the k most likely tokens, in falling order, [..., k], long.
        log_probs: their natural log-probabilities, [..., k], float32.
        log_sum_exp: of the logits, float32.
        entropy: in nats, float32.
        margin: log-probability of the most likely less that of the second, float32.
    """

    ids: Tensor
    log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    margin: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> TopKStatistics:
        """The same of some rows of the first dimension."""
        return TopKStatistics(
            self.ids[rows],
            self.log_probs[rows],
            self.log_sum_exp[rows],
            self.entropy[rows],
            self.margin[rows],
        )


def stack_top_k(rows: Sequence[TopKStatistics]) -> TopKStatistics:
    """Join statistics of single places ([...] each) to one of [n, ...]."""
    return TopKStatistics(
        **{f.name: torch.stack([getattr(row, f.name) for row in rows]) for f in fields(TopKStatistics)}
    )


def top_k_of(statistics: LogitStatistics, logits: Tensor, k: int, vocabulary: Tensor | None = None) -> TopKStatistics:
    """Statistics of logits [rows, vocabulary] with their top k, of leading shape [rows].

    Args:
        k: how many of the most likely tokens to keep (all, where there are fewer), 1 at least. One is in ``statistics``
            already, more are looked for in the logits.
        vocabulary: verifier ids of the logits' columns; None where the two are the same.
    """
    first = statistics.argmax[:, None]  # [rows, 1]
    if k == 1:
        ids, log_probs = first, statistics.log_top1[:, None]
    else:
        # Among equal logits topk takes any: the greedy choice is put first, so that it is that of argmax.
        ranked = logits.float().scatter(-1, first, torch.inf)
        ids = torch.topk(ranked, min(k, logits.shape[-1])).indices
        log_probs = logits.gather(-1, ids).float() - statistics.log_sum_exp[:, None]
    return TopKStatistics(
        ids=to_verifier_ids(ids, vocabulary),
        log_probs=log_probs,
        log_sum_exp=statistics.log_sum_exp,
        entropy=statistics.entropy,
        margin=statistics.margin,
    )


def top_k_statistics(logits: Tensor, k: int, vocabulary: Tensor | None = None) -> TopKStatistics:
    """Statistics of logits [..., vocabulary]; ``k`` and ``vocabulary`` as for :func:`top_k_of`.

    Example:
        >>> found = top_k_statistics(torch.tensor([[0.0, 0.0, -1e9]]), k=2)
        >>> round(found.entropy.item(), 4), found.margin.item()
        (0.6931, 0.0)
    """
    rows = logits.reshape(-1, logits.shape[-1])  # [rows, vocabulary]
    flat = top_k_of(logit_statistics(rows), rows, k, vocabulary)
    leading = logits.shape[:-1]
    whole = {f.name: getattr(flat, f.name) for f in fields(TopKStatistics)}
    return TopKStatistics(**{name: column.reshape((*leading, *column.shape[1:])) for name, column in whole.items()})
