"""Weights in the order that the kernels read: tiles of 16 outputs, zeros up to whole tiles and groups."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from viasd_calib.slim.low_bit import GROUP, RoundedWeight
from viasd_calib.slim.native.library import LinearStruct

PACKED_AT_ONCE = 2**14
"""Rows of a weight, whole tiles of them, that are packed at once: but for output heads, all of them."""
TILE = 16
"""Outputs of a tile."""
FORMATS = {16: 1, 8: 2, 4: 3}
"""The kernels' numbers for formats, by bits of a weight."""


class PackedWeight(NamedTuple):
    """A weight in the kernels' order.

    Attributes:
        bits: 16 (bfloat16), 8 or 4.
        shape: of the plain weight, [out, in].
        tiles: the weight, as linear.h describes it.
        steps: of codes, float32: [out] for 8 bits, [out / 16, in / 64, 16] for 4 bits; empty for 16.
        lowest: values of code 0 for 4 bits, as steps; else empty.
    """

    bits: int
    shape: tuple[int, int]
    tiles: Tensor
    steps: Tensor
    lowest: Tensor

    def struct(self, bias: Tensor | None, tile_pairs: bool = False, input_bits: int = 16) -> LinearStruct:
        """What the kernels are told of a layer; it holds no reference to the tensors.

        Args:
            bias: float32, [out up to whole tiles].
            tile_pairs: whether tiles of the first and the second half of the outputs are taken in pairs.
            input_bits: 16 or 8; inputs of bfloat16 weights have 16.
        """
        pointers = (None if not tensor.numel() else tensor.data_ptr() for tensor in self[2:])
        return LinearStruct(
            FORMATS[self.bits],
            whole(self.shape[1], GROUP),
            whole(self.shape[0], TILE),
            int(tile_pairs),
            input_bits,
            0,
            *pointers,
            None if bias is None else bias.data_ptr(),
        )


def whole(count: int, unit: int) -> int:
    """The next multiple of a unit.

    Example:
        >>> whole(576, 64), whole(577, 64)
        (576, 640)
    """
    return -(-count // unit) * unit


def pack_bfloat16(weight: Tensor) -> PackedWeight:
    """A weight [out, in] in bfloat16."""
    filled = _filled(weight.detach().to(torch.bfloat16))
    out, inputs = filled.shape
    tiles = filled.view(out // TILE, TILE, inputs // 2, 2).transpose(1, 2).contiguous()  # [tiles, in / 2, 16, 2]
    none = torch.empty(0)
    return PackedWeight(16, (weight.shape[0], weight.shape[1]), tiles, none, none)


def unpack_bfloat16(packed: PackedWeight) -> Tensor:
    """The weight that :func:`pack_bfloat16` was given: [out, in], bfloat16.

    Example:
        >>> weight = torch.randn(20, 70, dtype=torch.bfloat16)
        >>> torch.equal(unpack_bfloat16(pack_bfloat16(weight)), weight)
        True
    """
    out, inputs = packed.shape
    return packed.tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:out, :inputs].contiguous()


def pack_rounded(weight: RoundedWeight) -> PackedWeight:
    """A rounded weight in 8 or 4 bits; some rows after the others, so that what is between takes little memory."""
    rows = len(weight.codes)
    if rows <= PACKED_AT_ONCE:
        return _pack_rows(weight)
    begins = range(0, rows, PACKED_AT_ONCE)
    parts = [_pack_rows(weight.outputs(slice(begin, begin + PACKED_AT_ONCE))) for begin in begins]
    steps, lowest = (torch.cat([getattr(part, name) for part in parts]) for name in ("steps", "lowest"))
    return PackedWeight(
        weight.bits, (rows, weight.codes.shape[1]), torch.cat([part.tiles for part in parts]), steps, lowest
    )


def _pack_rows(weight: RoundedWeight) -> PackedWeight:
    codes = _filled(weight.codes)  # [out, in]
    out, inputs = codes.shape
    shape = (weight.codes.shape[0], weight.codes.shape[1])
    if weight.bits == 8:
        above_zero = codes.view(torch.uint8) ^ 128  # codes and 128
        tiles = (
            above_zero.view(out // TILE, TILE, inputs // 4, 4).transpose(1, 2).contiguous()
        )  # [tiles, in / 4, 16, 4]
        steps = torch.nn.functional.pad(weight.steps[:, 0], (0, out - shape[0]))
        return PackedWeight(8, shape, tiles, steps.contiguous(), torch.empty(0))
    groups = codes.view(out // TILE, TILE, inputs // GROUP, GROUP)  # [tiles, 16, groups, 64]
    halves = groups.view(*groups.shape[:3], 8, 2, 4).to(torch.uint8)
    tiles = (
        (halves[..., 0, :] | halves[..., 1, :] << 4).permute(0, 2, 3, 1, 4).contiguous()
    )  # [tiles, groups, 8, 16, 4]

    def by_tile(of_groups: Tensor) -> Tensor:
        """[out, groups] -> [tiles, groups, 16]."""
        filled = torch.nn.functional.pad(of_groups, (0, 0, 0, out - of_groups.shape[0]))
        return filled.view(out // TILE, TILE, -1).transpose(1, 2).contiguous()

    return PackedWeight(4, shape, tiles, by_tile(weight.steps), by_tile(weight.lowest))


def pack_bias(bias: Tensor | None) -> Tensor | None:
    """A bias [out] in float32, with zeros up to whole tiles; None for none."""
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.detach().float(), (0, whole(len(bias), TILE) - len(bias))).contiguous()


def _filled(matrix: Tensor) -> Tensor:
    """A matrix with zeros up to whole tiles of rows and groups of columns."""
    rows, columns = matrix.shape
    if whole(columns, GROUP) == columns and whole(rows, TILE) == rows:
        return matrix  # padding copies what needs no zeros, too
    return torch.nn.functional.pad(matrix, (0, whole(columns, GROUP) - columns, 0, whole(rows, TILE) - rows))


def pointer_to(struct: ctypes.Structure | ctypes.Array[Any]) -> int:
    """Address of a struct."""
    return ctypes.addressof(struct)
