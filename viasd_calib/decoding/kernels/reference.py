"""What the kernels compute, in plain torch: their reference in tests, and the path of every other device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FAINTEST = -1e4
"""Logits this far below the largest one, whose probability is 0 in float32, count as one another: so an impossible
token's -inf adds 0, not NaN."""

ROWS = ("maximum", "log_sum_exp", "argmax", "entropy", "second")
"""Fields of statistics that have a value for every row."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of logits; all are read as float32."""


@dataclass(frozen=True)
class LogitStatistics:
    """Statistics of rows of logits, and of k tokens proposed at the first k rows.

    A row that holds NaN or +inf is no distribution: its float fields are NaN, and ``argmax`` is any index
    within the vocabulary. A row of -inf alone has ``log_sum_exp`` -inf. So ``isfinite(log_sum_exp)``
    separates usable rows from others.

    Attributes:
        maximum: the largest logit, [rows], float32.
        log_sum_exp: of the logits, in nats, [rows], float32.
        argmax: the lowest index of the largest logit, [rows], long.
        entropy: in nats, [rows], float32.
        second: the second largest logit, equal to ``maximum`` where that occurs twice; -inf for a
            vocabulary of one. [rows], float32.
        log_ratio: logit of the proposed token less ``maximum``, [k], float32; NaN for a token outside the
            vocabulary.
    """

    maximum: Tensor
    log_sum_exp: Tensor
    argmax: Tensor
    entropy: Tensor
    second: Tensor
    log_ratio: Tensor

    @property
    def margin(self) -> Tensor:
        """Log-probability of the most likely token less that of the second, in nats: [rows], float32."""
        return self.maximum - self.second

    @property
    def log_top1(self) -> Tensor:
        """Log-probability of the most likely token, in nats: [rows], float32, at most 0."""
        return self.maximum - self.log_sum_exp


def join_statistics(parts: Sequence[LogitStatistics]) -> LogitStatistics:
    """Statistics of rows, one at least, as statistics of them all; those of tokens are left out."""
    rows = {name: torch.cat([getattr(part, name) for part in parts]) for name in ROWS}
    return LogitStatistics(**rows, log_ratio=rows["maximum"][:0])


def check(logits: Tensor, tokens: Tensor) -> None:
    """Refuse logits and tokens that no implementation reads.

    Raises:
        ValueError: shapes, types or devices do not fit.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [rows, vocabulary], not {list(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float64, float32, bfloat16 or float16, not {logits.dtype}")
    if tokens.ndim != 1 or tokens.shape[0] > logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits go with tokens [k <= rows], not {list(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be integers, not {tokens.dtype}")
    if tokens.device != logits.device:
        raise ValueError(f"tokens are on {tokens.device}, logits on {logits.device}")


def no_tokens(logits: Tensor) -> Tensor:
    """No tokens: [0], long."""
    return torch.empty(0, dtype=torch.long, device=logits.device)


def logit_statistics_torch(logits: Tensor, tokens: Tensor | None = None) -> LogitStatistics:
    """The same as ``logit_statistics`` in torch operations, on any device.

    Example:
        >>> found = logit_statistics_torch(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([2]))
        >>> round(found.entropy.item(), 4), found.log_ratio.item()
        (0.6931, -inf)
    """
    tokens = no_tokens(logits) if tokens is None else tokens
    check(logits, tokens)
    values = logits.float()  # [rows, vocabulary]
    maximum, argmax = values.max(-1)  # [rows] each
    anchor = maximum.clamp(min=torch.finfo(torch.float32).min)  # -inf less -inf would be NaN
    shifted = (values - anchor[:, None]).clamp_(min=FAINTEST)  # [rows, vocabulary]
    weights = shifted.exp()
    total = weights.sum(-1)  # [rows], NaN where a logit is NaN or +inf
    weighted = shifted.mul_(weights).sum(-1)  # [rows]
    second = values.scatter(-1, argmax[:, None], -torch.inf).amax(-1)
    broken = total.isnan()
    maximum, second = (value.masked_fill(broken, torch.nan) for value in (maximum, second))
    log_total = total.log()
    log_ratio = maximum[:0]
    if tokens.shape[0] > 0:  # a dozen small operations, for nothing
        log_ratio = _logits_of(tokens, values) - maximum[: tokens.shape[0]]  # [k]
    return LogitStatistics(
        maximum=maximum,
        log_sum_exp=maximum + log_total,
        argmax=argmax,
        entropy=log_total - weighted / total,
        second=second,
        log_ratio=log_ratio,
    )


def _logits_of(tokens: Tensor, values: Tensor) -> Tensor:
    """The logits of k tokens at the first k rows, NaN for tokens outside the vocabulary: [k]."""
    inside = (tokens >= 0) & (tokens < values.shape[1])
    ids = tokens.long().masked_fill(~inside, 0)
    own = values[: tokens.shape[0]].gather(-1, ids[:, None])[:, 0]  # [k]
    return own.masked_fill(~inside, torch.nan)
