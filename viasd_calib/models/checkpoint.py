"""The weights of a checkpoint one by one, from its safetensors files: nothing is read but what is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from viasd_calib.models.loading import local_file


class Checkpoint:
    """Named weights in the safetensors files of a model.

    Args:
        name_or_path: a folder, or a hub id whose files have been downloaded.
        revision: of a hub id.
        prefix: what names of weights begin with in a model and may lack in a file that holds its decoder alone.

    Raises:
        ValueError: there are no safetensors files, or what lists them is damaged.
        OSError: one of them cannot be read.
        SafetensorError: one of them is damaged.
    """

    def __init__(self, name_or_path: str, revision: str | None = None, prefix: str = "model.") -> None:
        self._prefix = prefix
        self._files = _files_by_name(name_or_path, revision)

    def read(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights by name, in a number format.

        Args:
            shapes: that they are to have, by name.

        Raises:
            ValueError: one of them is missing, or has another shape.
            OSError: a file cannot be read.
            SafetensorError: a file is damaged.
        """
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in shapes:
            stored = self._stored(name)
            by_file.setdefault(self._files[stored], []).append((name, stored))
        for path, both in by_file.items():
            with safe_open(path, framework="pt") as tensors:
                for name, stored in both:
                    shape = tensors.get_slice(stored).get_shape()
                    if shape != list(shapes[name]):
                        raise ValueError(f"its weight {name} has the shape {shape}, not {list(shapes[name])}")
                    found[name] = tensors.get_tensor(stored).to(dtype)
        return found

    def has(self, name: str) -> bool:
        """Whether a weight is there."""
        return name in self._files or name.removeprefix(self._prefix) in self._files

    def _stored(self, name: str) -> str:
        for stored in (name, name.removeprefix(self._prefix)):
            if stored in self._files:
                return stored
        raise ValueError(f"its weights are incomplete, {name} is missing")


def _files_by_name(name_or_path: str, revision: str | None) -> Mapping[str, Path]:
    """The file that each weight is in."""
    index = local_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, revision)
    whole = local_file(name_or_path, SAFE_WEIGHTS_NAME, revision)
    if whole is not None:
        with safe_open(whole, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), whole)
    if index is None:
        raise ValueError("it has no safetensors files on this machine; download it, or save it as safetensors")
    try:
        shards = {str(weight): str(file) for weight, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its file {index.name} is damaged; download it again") from error
    paths: dict[str, Path] = {}
    for file in sorted(set(shards.values())):
        path = local_file(name_or_path, file, revision)
        if path is None:
            raise ValueError(f"its weights are incomplete, the file {file} is missing; download it again")
        paths[file] = path
    return {weight: paths[file] for weight, file in shards.items()}
