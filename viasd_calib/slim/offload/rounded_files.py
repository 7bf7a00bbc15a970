"""Low-bit copies on disk, of verifiers whose layers are read: rounded once, layer by layer, and then read as they are.

A file holds the codes and steps of a sublayer, or of the output head, under the hash of the model's weights; its folder
names the number format that they were rounded from, and the rule. Bits of inputs are no matter of codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from viasd_calib.errors import StorageError
from viasd_calib.models.hashes import cache_folder
from viasd_calib.models.offloaded import layer_weights, layers_in_memory
from viasd_calib.slim.low_bit import GROUP, ROUNDING, Bits, RoundedWeight, held_parts, round_weight, weight_of
from viasd_calib.slim.offload.layer_files import Shape, SublayerFile, bytes_of_tensor, sublayer_file

LOW_BITS = "low-bits"
"""Their folder, under the cache folder."""


def rounded_weights(
    model: PreTrainedModel, name: str | None, linears: Mapping[str, nn.Linear], bits: Bits
) -> list[RoundedWeight]:
    """The weights of linear layers in low bits.

    Where the model was loaded without its layers, they are read from the cache folder, and written there first where
    they are not there or, with a warning, are damaged.

    Args:
        name: of their file; None where their weights are not the model's own, and are rounded each time.
        linears: by their names in the file.

    Raises:
        ModelError: the plain weights cannot be read.
        StorageError: the file cannot be written or read.
    """
    weights = [linear.weight for linear in linears.values()]

    def make() -> list[RoundedWeight]:
        with layers_in_memory(model, weights):
            return [round_weight(weight, bits) for weight in weights]

    source = layer_weights(model)
    if name is None or source is None or source.sha256 is None:
        return make()
    shapes = {
        f"{path}.{part}": shape
        for path, linear in linears.items()
        for part, shape in stored_shapes(linear.out_features, linear.in_features, bits).items()
    }

    def stored() -> dict[str, Tensor]:
        return {
            f"{path}.{part}": tensor
            for path, weight in zip(linears, make(), strict=True)
            for part, tensor in stored_parts(weight).items()
        }

    file = sublayer_file(rounded_folder(source.sha256, weights[0].dtype) / f"{name}-{bits}.bin", shapes, stored)
    found = _read(file, weights[0].device)
    return [
        of_stored(bits, one.in_features, {part: found[f"{path}.{part}"] for part in stored_shapes(1, 1, bits)})
        for path, one in linears.items()
    ]


def rounded_folder(weights_sha256: str, dtype: torch.dtype) -> Path:
    """Where the low-bit copies of a model lie, under the cache folder.

    Args:
        weights_sha256: hash of the model's weights.
        dtype: number format that they are rounded from.
    """
    rule = f"{str(dtype).removeprefix('torch.')}-{GROUP}-{ROUNDING}"
    return cache_folder() / LOW_BITS / weights_sha256 / rule


def stored_shapes(out: int, inputs: int, bits: Bits) -> dict[str, Shape]:
    """Of what :func:`stored_parts` gives for a weight [out, in]."""
    if bits == 8:
        return {"codes": Shape((out, inputs), torch.int8), "steps": Shape((out, 1), torch.float32)}
    groups = Shape((out, -(-inputs // GROUP)), torch.float32)
    return {"codes": Shape((out, -(-inputs // 2)), torch.uint8), "steps": groups, "lowest": groups}


def stored_parts(weight: RoundedWeight) -> dict[str, Tensor]:
    """A weight as a file holds it: two codes of 4 bits to a byte, the first in its low half."""
    parts = zip(("codes", "steps", "lowest"), held_parts(weight), strict=True)
    return {name: part for name, part in parts if part is not None}


def of_stored(bits: Bits, inputs: int, parts: Mapping[str, Tensor]) -> RoundedWeight:
    """The weight that :func:`stored_parts` was given, with so many inputs."""
    if bits == 8:
        return weight_of(parts["codes"], parts["steps"], None, inputs)
    # Copies: as views they would hold all that was read, and so the codes a second time.
    return weight_of(parts["codes"], parts["steps"].clone(), parts["lowest"].clone(), inputs)


def _read(file: SublayerFile, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file, by name, on a device."""
    buffer = torch.empty(file.bytes, dtype=torch.uint8)
    try:
        with file.path.open("rb", buffering=0) as opened:
            done = opened.readinto(bytes_of_tensor(buffer))
    except OSError as error:
        raise StorageError(f"cannot read {file.path}: {error.strerror or error}; run again to make it anew") from error
    if done != file.bytes:
        raise StorageError(f"{file.path} was changed while it was in use; run again to make it anew")
    return {name: place.view(buffer).to(device) for name, place in file.places.items()}
