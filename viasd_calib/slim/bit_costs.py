"""What products of 16, 8 and 4 bits cost on the machine at hand, with the kernels that will decode."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from viasd_calib.errors import MachineWarning
from viasd_calib.slim.backends import default_backend, prepare
from viasd_calib.slim.cost import interleaved_seconds
from viasd_calib.slim.low_bit import InputBits, LowBitLinear
from viasd_calib.slim.low_bit_kernel import why_no_triton_kernel
from viasd_calib.slim.native.library import why_no_kernels

Shape = tuple[int, int]
"""Of a weight: outputs and inputs."""
WIDTHS = (1, 4)
"""Tokens of the timed products."""
DTYPE = torch.bfloat16


@torch.no_grad()
def product_seconds(
    shapes: Iterable[Shape], tried: Sequence[int], device: torch.device, input_bits: InputBits = 16, repeats: int = 15
) -> dict[tuple[Shape, int], float]:
    """Seconds of a product with a weight of each shape, in 16 bits and in those tried: medians, averaged over widths.

    Weights are in bfloat16, as they decode, whatever format the verifier is fitted in. Where nothing has kernels for
    low bits, a warning says so, and they cost what 16 bits cost.
    """
    backend = default_backend(device, DTYPE)
    lacking = None if why_no_triton_kernel(device, DTYPE) is None else why_no_kernels(device, DTYPE)
    if lacking is not None:
        warnings.warn(
            f"nothing has kernels for low bits here ({lacking}): they are taken to cost what 16 bits cost",
            MachineWarning,
            stacklevel=2,
        )
    seconds: dict[tuple[Shape, int], float] = {}
    for shape in dict.fromkeys(shapes):
        timed = [16, *(bits for bits in tried if bits != 16 and lacking is None)]
        layers = nn.ModuleList(_layer(shape, bits, device, input_bits) for bits in timed)
        prepare([layers], backend, device, DTYPE)
        rows = [torch.ones(width, shape[1], dtype=DTYPE, device=device) for width in WIDTHS]
        runs = [_run(layer, row) for layer in layers for row in rows]
        medians = [statistics.median(times) for times in interleaved_seconds(runs, repeats, device)]
        for number, bits in enumerate(timed):
            seconds[shape, bits] = statistics.mean(medians[number * len(WIDTHS) : (number + 1) * len(WIDTHS)])
        seconds.update({(shape, bits): seconds[shape, 16] for bits in tried if bits not in timed})
    return seconds


def _layer(shape: Shape, bits: int, device: torch.device, input_bits: InputBits) -> nn.Module:
    out, inputs = shape
    linear = nn.Linear(inputs, out, bias=False, dtype=DTYPE, device=device)
    return linear if bits == 16 else LowBitLinear(linear, 8 if bits == 8 else 4, input_bits)


def _run(layer: nn.Module, rows: Tensor) -> Callable[[], object]:
    return lambda: layer(rows)
