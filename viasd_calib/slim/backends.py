"""Backends: what runs the modules of verifier and drafter on the machine at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import nn

from viasd_calib.errors import ModelError
from viasd_calib.slim.grouped import group_heads
from viasd_calib.slim.packed import can_pack, pack_linears

Backend = Literal["eager", "packed"]
"""``eager`` runs the modules as they are; ``packed`` has their weights in the order of the CPU's kernels, layers
that read the same input as one product and, where attention is ``sdpa``, query heads that share keys as rows of one
product."""

BACKENDS: tuple[Backend, ...] = get_args(Backend)


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that measured best: in float32 PyTorch's own kernels read plain weights as fast as packed ones.

    Example:
        >>> default_backend(torch.device("cpu"), torch.float32)
        'eager'
    """
    return "packed" if dtype == torch.bfloat16 and can_pack(device, dtype) else "eager"


def prepare(modules: Iterable[nn.Module], backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Make ``modules`` ready for a backend, in place; they can then no longer be trained or saved.

    Raises:
        ModelError: the backend does not run on ``device`` in ``dtype``.
    """
    if backend == "eager":
        return
    if not can_pack(device, dtype):
        raise ModelError(
            f"backend packed needs a CPU that calculates in {dtype} and a PyTorch with oneDNN; "
            f"device {device} is none, choose backend eager"
        )
    modules = tuple(modules)
    pack_linears(modules)
    group_heads(modules)
