"""Which weights a model has: a hash of its files, and whether a model in memory still has those."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from viasd_calib.choices import SMOLLM2
from viasd_calib.model_names import expanded, is_gguf
from viasd_calib.models.adapters import find_adapter
from viasd_calib.models.gguf import SMOLLM2_SHA256, converted_from
from viasd_calib.models.hashes import cached_sha256, files_sha256
from viasd_calib.models.loading import weight_files


def weights_sha256(name_or_path: str, revision: str | None = None) -> str | None:
    """Hash of a model's weights; None where their files are not on this machine.

    Of a GGUF file it is that of the file, also where its converted folder is named; of an adapter that of the base
    model's weights and its own; else that of the weight files' names and hashes (:func:`files_sha256`).

    Args:
        name_or_path: as for :func:`~viasd_calib.models.load_verifier`.
        revision: of a hub id.

    Raises:
        OSError: a file cannot be read.
        ModelError: the description of an adapter is damaged.
    """
    if name_or_path == SMOLLM2:
        return SMOLLM2_SHA256
    name_or_path = expanded(name_or_path)
    if is_gguf(name_or_path):
        return cached_sha256(Path(name_or_path)) if Path(name_or_path).is_file() else None
    adapter = find_adapter(name_or_path, revision)
    if adapter is not None:
        parts = (weights_sha256(adapter.base, adapter.base_revision), adapter.sha256)
        return None if None in parts else hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    files = weight_files(name_or_path, revision)
    if not files:
        return None
    digest = files_sha256(files)
    return converted_from(Path(name_or_path), digest) or digest


@torch.no_grad()
def weights_in_memory(model: PreTrainedModel) -> str | None:
    """Hash of the weights of a model that somebody else loaded; None where nobody can say.

    It is that of the files that the model was loaded from, if every weight is still in them: the first and last row
    of each are compared, which any training or merging changes.

    Raises:
        OSError: a file cannot be read.
    """
    source = model.name_or_path
    if not source or is_gguf(source) or find_adapter(source) is not None:
        return None
    state = {name: weight for name, weight in model.state_dict().items() if weight.is_floating_point()}
    agreeing: set[int] = set()
    for path in weight_files(source).values():
        try:
            with safe_open(path, framework="pt") as tensors:
                names = state.keys() & set(tensors.keys())
                agreeing |= {
                    state[name].data_ptr() for name in names if _ends_agree(state[name], tensors.get_slice(name))
                }
        except SafetensorError:  # a file of another kind, which cannot be read in part
            return None
    everything = {weight.data_ptr() for weight in state.values()}  # tied weights are one
    return weights_sha256(source) if agreeing == everything else None


def _ends_agree(weight: Tensor, filed: Any) -> bool:
    """Whether a weight is still what a file says, looked at where it begins and ends."""
    if list(weight.shape) != filed.get_shape():
        return False
    rows = len(weight) if weight.ndim else 0
    parts = [slice(0, 1), slice(rows - 1, rows)] if weight.ndim > 1 else [slice(None)] if rows else [()]
    return all(torch.equal(weight[part].cpu(), filed[part].to(weight.dtype)) for part in parts)
