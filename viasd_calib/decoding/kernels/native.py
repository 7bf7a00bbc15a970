"""The statistics on CPUs that have the project's compiled kernels, for logits in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from viasd_calib.decoding.kernels.reference import LogitStatistics
from viasd_calib.slim.native.library import kernels
from viasd_calib.slim.native.team import team


def logit_statistics_native(logits: Tensor, tokens: Tensor) -> LogitStatistics:
    """The same as ``logit_statistics``, for bfloat16 logits on a CPU."""
    rows, vocabulary = logits.shape
    logits, tokens = logits.contiguous(), tokens.long().contiguous()
    values = torch.empty(4, rows)
    argmax = torch.empty(rows, dtype=torch.long)
    log_ratio = torch.empty(tokens.shape[0])
    kernels().viasd_statistics(
        *(logits.data_ptr(), vocabulary, rows, tokens.data_ptr(), tokens.shape[0]),
        *(values.data_ptr(), argmax.data_ptr(), log_ratio.data_ptr(), team().size),
    )
    maximum, log_sum_exp, entropy, second = values
    return LogitStatistics(maximum, log_sum_exp, argmax, entropy, second, log_ratio)
