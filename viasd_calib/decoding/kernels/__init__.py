"""The statistics of logits that gates use, in one pass over them.

``logit_statistics`` runs two Triton kernels on a GPU, the project's own compiled ones for bfloat16 on a CPU that has
them (:mod:`viasd_calib.slim.native`), and plain torch elsewhere, with equal results. Triton is optional
(``pip install 'viasd_calib[gpu]'``, or with torch's CUDA wheels) and loaded at the first call that needs it.

It is called for:

- A drafted token that the draft gate is asked of: ``argmax`` is the token, the rest its features.
- The slim tier under a calibrated or a margin rule: q''s features at the block and after it.
- Every summary in traces (:func:`viasd_calib.decoding.top_k.top_k_statistics`), so that gates are fitted on the numbers
  that they see.

Not by catch-up and the ratio rule, which need no more than the largest logit of a row. In torch that is one cheap
reduction, and the other statistics would be for nothing; on a GPU it is as few launches.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from viasd_calib.decoding.kernels.reference import (
    LogitStatistics,
    check,
    join_statistics,
    logit_statistics_torch,
    no_tokens,
)
from viasd_calib.slim.native.library import cpu_has_kernels

__all__ = ["LogitStatistics", "join_statistics", "logit_statistics", "logit_statistics_torch"]


def logit_statistics(logits: Tensor, tokens: Tensor | None = None) -> LogitStatistics:
    """Statistics of every row of ``logits``, and of the tokens proposed at the leading rows, reading each row once.

    Args:
        logits: of p, q' or q, [rows, vocabulary], float64, float32, bfloat16 or float16, of any strides, all read
            as float32; -inf marks an impossible token.
        tokens: the tokens proposed at the first k rows, [k], integers, k <= rows; may be empty or left
            out.

    Returns:
        A ``LogitStatistics`` on the logits' device; the host does not wait for it.

    Raises:
        ValueError: shapes, types or devices do not fit.

    Example:
        >>> found = logit_statistics(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([2]))
        >>> found.argmax.tolist(), found.margin.tolist(), found.log_ratio.tolist()
        ([1, 0], [1.0, 3.0], [-1.0])
    """
    fused = logits.is_cuda and logits.shape[0] > 0 and has_triton()
    native = logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and cpu_has_kernels()
    if not (fused or native):
        return logit_statistics_torch(logits, tokens)
    tokens = no_tokens(logits) if tokens is None else tokens
    check(logits, tokens)
    if native:
        from viasd_calib.decoding.kernels.native import logit_statistics_native

        return logit_statistics_native(logits, tokens)
    from viasd_calib.decoding.kernels.fused import logit_statistics_fused

    return logit_statistics_fused(logits, tokens)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
