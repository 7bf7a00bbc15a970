"""A Triton kernel for products with weights of eight or four bits. Compiled and interpreted in tests; not run on a GPU.

A slim pass has few rows, so a product takes as long as its weight takes to read: codes are widened in registers, where
they are exact in bfloat16 and in float16, and multiplied by the tensor cores. With 16 rows to a tile and one order of
summation, what a row gives does not depend on the others, bit for bit.

Bytes moved for [rows, in] times [out, in]: in * out for 8 bits; for 4 bits half of that, and 8 bytes for each 64
weights. A weight in bfloat16 has 2 * in * out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from viasd_calib.slim.in_process import Unsaved
from viasd_calib.slim.linears import places_of
from viasd_calib.slim.low_bit import GROUP, LowBitLinear, RoundedWeight, round_inputs
from viasd_calib.slim.triton_jit import jit

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported anywhere; calling it needs Triton
    triton = None

ROWS = 16
"""Of a tile, the fewest that tensor cores take."""
OUTPUTS = 32
"""Of a program: few, so that a small layer still fills a GPU."""
WARPS = 4
DTYPES = (torch.bfloat16, torch.float16)
"""Of inputs that the kernel takes."""


@jit("rows")
def multiply_codes(
    inputs: tl.tensor,
    weight: tl.tensor,
    steps: tl.tensor,
    lowest: tl.tensor,
    bias: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    """One tile of rows and outputs; grid (tiles of outputs, tiles of rows).

    Args:
        inputs: [rows, in_features], contiguous.
        weight: 8 bits: [out, groups * 64], int8, 0 after ``in_features``; 4 bits: [out, groups * 32], uint8, inputs 0
            to 31 of a group in the low halves, 32 to 63 in the high ones.
        steps: float32, [out] for 8 bits, [out, groups] for 4 bits.
        lowest: float32, [out, groups]: the value of code 0 in 4 bits; not read for 8 bits.
        bias: [out]; not read without ``HAS_BIAS``.
        scales: of the rows, [rows], float32; not read without ``HAS_SCALES``.
        out: [rows, out_features], contiguous.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]
    known, wanted = row < rows, column < out_features
    groups = (in_features + 63) // 64
    half = tl.arange(0, 32)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    from_row = inputs + row.to(tl.int64)[:, None] * in_features
    for group in range(groups):
        place = group * 64 + half  # [32]
        low = tl.load(from_row + place[None], known[:, None] & (place < in_features)[None], 0.0)  # [ROWS, 32]
        after = place + 32
        high = tl.load(from_row + after[None], known[:, None] & (after < in_features)[None], 0.0)
        if BITS == 8:
            codes = weight + column.to(tl.int64)[:, None] * (groups * 64) + place[None]  # [OUTPUTS, 32]
            first = tl.load(codes, wanted[:, None], 0).to(low.dtype)
            second = tl.load(codes + 32, wanted[:, None], 0).to(low.dtype)
            total = tl.dot(low, tl.trans(first), total)
            total = tl.dot(high, tl.trans(second), total)
        else:
            pairs = weight + column.to(tl.int64)[:, None] * (groups * 32) + group * 32 + half[None]  # [OUTPUTS, 32]
            codes = tl.load(pairs, wanted[:, None], 0)
            part = tl.dot(low, tl.trans((codes & 15).to(low.dtype)))
            part = tl.dot(high, tl.trans((codes >> 4).to(low.dtype)), part)
            of_group = column * groups + group
            step, least = tl.load(steps + of_group, wanted, 0.0), tl.load(lowest + of_group, wanted, 0.0)
            sums = tl.sum(low.to(tl.float32), 1) + tl.sum(high.to(tl.float32), 1)  # [ROWS]
            total += part * step[None] + sums[:, None] * least[None]
    if BITS == 8:
        total *= tl.load(steps + column, wanted, 0.0)[None]
    if HAS_SCALES:
        total *= tl.load(scales + row, known, 0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + column, wanted, 0.0).to(tl.float32)[None]
    tl.store(out + row.to(tl.int64)[:, None] * out_features + column[None], total, known[:, None] & wanted[None])


def packed_codes(weight: RoundedWeight) -> Tensor:
    """A weight's codes as the kernel reads them: [out, groups * 64] for 8 bits, [out, groups * 32] for 4.

    Example:
        >>> codes = packed_codes(LowBitLinear(nn.Linear(70, 3), 4).rounded)
        >>> codes.shape, codes.dtype
        (torch.Size([3, 64]), torch.uint8)
    """
    codes: Tensor = nn.functional.pad(weight.codes, (0, -weight.codes.shape[1] % GROUP))  # [out, groups * 64]
    if weight.bits == 8:
        return codes.contiguous()
    halves = codes.unflatten(1, (-1, 2, GROUP // 2)).to(torch.uint8)  # [out, groups, 2, 32]
    pairs: Tensor = halves[:, :, 0] | halves[:, :, 1] << 4  # [out, groups, 32]
    return pairs.flatten(1).contiguous()


class TritonLowBitLinear(Unsaved, nn.Module):
    """What a :class:`LowBitLinear` gives, by the kernel; inputs in bfloat16 or float16 on a GPU.

    Inputs of 16 bits are taken as they are. Such of 8 bits are rounded first, one step a row.
    """

    def __init__(self, layer: LowBitLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.input_bits = layer.bits, layer.input_bits
        self.cost_key = layer.cost_key
        rounded = layer.rounded
        self._codes, self._steps, self._lowest = packed_codes(rounded), rounded.steps, rounded.lowest
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the number format of the inputs."""
        rows = inputs.reshape(-1, self.in_features).contiguous()  # [rows, in]
        scales = self._steps  # what the kernel does not read, any tensor stands for
        bias = self._steps if self.bias is None else self.bias
        if self.input_bits == 8:
            codes, steps = round_inputs(rows, 8)
            rows, scales = codes[0].to(rows.dtype), steps[0].contiguous()  # codes of 8 bits are exact
        out = rows.new_empty(rows.shape[0], self.out_features)
        grid = triton.cdiv(self.out_features, OUTPUTS), triton.cdiv(rows.shape[0], ROWS)
        multiply_codes[grid](
            *(rows, self._codes, self._steps, self._lowest, bias, scales, out),
            *(rows.shape[0], self.in_features, self.out_features),
            BITS=self.bits,
            HAS_BIAS=self.bias is not None,
            HAS_SCALES=self.input_bits == 8,
            ROWS=ROWS,
            OUTPUTS=OUTPUTS,
            num_warps=WARPS,
        )
        return out.reshape(*inputs.shape[:-1], self.out_features)


def use_kernel(modules: Iterable[nn.Module]) -> None:
    """Exchange, in place, every :class:`LowBitLinear` inside ``modules`` for one that the kernel runs."""
    for place in places_of(modules, LowBitLinear):
        place.put(TritonLowBitLinear(place.linear))


def why_no_triton_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernel lacks, in words; None where it runs.

    Example:
        >>> why_no_triton_kernel(torch.device("cuda"), torch.float32)
        'it multiplies bfloat16 and float16, not float32'
    """
    if device.type != "cuda":
        return f"device {device} is no CUDA device"
    if dtype not in DTYPES:
        return f"it multiplies bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return "Triton is not installed: pip install 'viasd_calib[gpu]'" if triton is None else None
