"""The tensor files beside a spec that make q': read with one complaint, written in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from viasd_calib.errors import SpecError
from viasd_calib.files import write_bytes


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Args:
        what: the file should hold.

    Raises:
        SpecError: missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpecError(f"{path} cannot be read as {what} ({error}); export the spec again") from error


def write_bfloat16(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors in bfloat16, atomically."""
    halved = {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in tensors.items()}
    write_bytes(path, save(halved))
