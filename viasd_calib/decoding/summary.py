"""What a model said at a place, in a few numbers: written to traces, read by gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from viasd_calib.draft.base import to_verifier_ids


@dataclass(frozen=True)
class Summary:
    """Scalars and the top k of distributions; every field has the logits' leading shape.

    Attributes:
        ids: verifier ids of the k likeliest tokens, likeliest first, [..., k], long.
        log_probs: their natural log-probabilities, [..., k], float32.
        log_sum_exp: of the logits, float32.
        entropy: in nats, float32.
        margin: log-probability of the likeliest less that of the second, float32.
    """

    ids: Tensor
    log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    margin: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> Summary:
        """The same of some rows of the first dimension."""
        return Summary(
            self.ids[rows],
            self.log_probs[rows],
            self.log_sum_exp[rows],
            self.entropy[rows],
            self.margin[rows],
        )


def stack_summaries(rows: Sequence[Summary]) -> Summary:
    """Join summaries of single places ([...] each) to one of [n, ...]."""
    return Summary(**{f.name: torch.stack([getattr(row, f.name) for row in rows]) for f in fields(Summary)})


def summarize(logits: Tensor, k: int, vocabulary: Tensor | None = None) -> Summary:
    """Summarise logits [..., vocabulary], keeping the ``k`` likeliest tokens (all, where there are fewer).

    Example:
        >>> said = summarize(torch.tensor([[0.0, 0.0, -1e9]]), k=2)
        >>> round(said.entropy.item(), 4), said.margin.item()
        (0.6931, 0.0)
    """
    logits = logits.float()
    log_sum_exp = logits.logsumexp(-1)  # [...]
    log_probs = logits - log_sum_exp[..., None]  # [..., vocabulary]
    entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
    # Among equal logits topk takes any: the greedy choice is put first, so that it is that of argmax.
    ranked = log_probs.scatter(-1, logits.argmax(-1, keepdim=True), torch.inf)
    ids = torch.topk(ranked, min(max(k, 2), logits.shape[-1])).indices
    top = log_probs.gather(-1, ids)
    return Summary(
        ids=to_verifier_ids(ids[..., :k], vocabulary),
        log_probs=top[..., :k],
        log_sum_exp=log_sum_exp,
        entropy=entropy,
        margin=top[..., 0] - top[..., 1],
    )
