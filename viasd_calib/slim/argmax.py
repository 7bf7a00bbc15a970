"""The most likely token of rows of logits, fast on a CPU too."""

from __future__ import annotations

import torch
from torch import Tensor

from viasd_calib.slim.native.library import cpu_has_kernels, kernels


def argmax(logits: Tensor) -> Tensor:
    """The first of the most likely tokens of each row ([..., vocabulary]): [...], long.

    As ``Tensor.argmax``, which on a CPU reads bfloat16 one by one and takes up to thirty times as long. Of a row that
    holds NaN any index.

    Example:
        >>> argmax(torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])).tolist()
        [1, 0]
    """
    return _largest(logits)[0] if _has_kernel(logits) else logits.max(-1).indices


def largest_logit(logits: Tensor) -> Tensor:
    """The largest logit of each row ([..., vocabulary]): [...], float32; NaN of a row that holds NaN.

    As ``Tensor.amax``, which on a CPU shares a row of more than 32,768 logits among threads: beside other work it then
    waits for one that has no core, longer than the reduction takes.

    Example:
        >>> largest_logit(torch.tensor([[0.0, 2.0, 2.0], [1.0, float("nan"), 0.0]])).tolist()
        [2.0, nan]
    """
    return _largest(logits)[1] if _has_kernel(logits) else logits.amax(-1).float()


def _has_kernel(logits: Tensor) -> bool:
    return logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and cpu_has_kernels()


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    places, values = torch.empty(logits.shape[:-1], dtype=torch.long), torch.empty(logits.shape[:-1])
    kernels().viasd_largest(logits.data_ptr(), logits.shape[-1], places.numel(), places.data_ptr(), values.data_ptr())
    return places, values
