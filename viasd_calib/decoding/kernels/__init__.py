"""All that a gate reads off logits, in one pass over them.

``read_rows`` runs two Triton kernels on a GPU and plain torch elsewhere; both say the same. Triton is
optional (``pip install 'viasd_calib[gpu]'``, or with torch's CUDA wheels) and loaded at the first call that
needs it.

What the decoder would take from one call, with nothing copied to the host:

- The slim tier under the ratio convention: ``read_rows(logits[trusted:], tokens[trusted:], accept_at)``
  on q''s logits at the block and behind it, k + 1 rows for k tokens. ``accepted`` counts the leading tokens
  kept behind the trusted ones, ``log_ratio`` places the next one in its band, ``argmax`` is q's slim choice.
- Catch-up: ``read_rows(logits, pending, tolerance)`` on q's logits. ``accepted`` is the audit ``tolerant``,
  ``argmax`` decides the block, and a ``log_sum_exp`` that is not finite raises ``NumericsError``.
- Draft and slim gates: ``entropy``, ``margin``, ``log_top1`` and ``log_ratio`` are their features.
"""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor

from viasd_calib.decoding.kernels.reference import Reading, check, read_rows_in_torch

__all__ = ["Reading", "read_rows", "read_rows_in_torch"]


def read_rows(logits: Tensor, tokens: Tensor, accept_at: float = 0.0) -> Reading:
    """Read every row of ``logits`` once, and judge the tokens proposed at the leading rows.

    Args:
        logits: of p, q' or q, [rows, vocabulary], float32, bfloat16 or float16, of any strides; -inf marks an
            impossible token.
        tokens: the tokens proposed at the first k rows, [k], integers, k <= rows; may be empty.
        accept_at: the ratio to the likeliest token's probability at which a token is accepted, in [0, 1].

    Returns:
        A ``Reading`` on the logits' device; the host does not wait for it.

    Raises:
        ValueError: shapes, types or devices do not fit.

    Example:
        >>> import torch
        >>> said = read_rows(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([2]), accept_at=0.5)
        >>> said.argmax.tolist(), said.margin.tolist(), said.log_ratio.tolist(), said.accepted.item()
        ([1, 0], [1.0, 3.0], [-1.0], 0)
    """
    if logits.is_cuda and logits.shape[0] > 0 and has_triton():
        from viasd_calib.decoding.kernels.fused import read_rows_fused

        check(logits, tokens)
        return read_rows_fused(logits, tokens, accept_at)
    return read_rows_in_torch(logits, tokens, accept_at)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
