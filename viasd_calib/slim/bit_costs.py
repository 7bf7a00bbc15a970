"""What products of 16, 8 and 4 bits cost on the machine at hand, with the kernels that will decode."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from viasd_calib.errors import MachineWarning
from viasd_calib.hardware import last_level_cache
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

    Weights are in bfloat16, as they decode, whatever format the verifier is fitted in, and lie in memory, as they do
    when a pass comes to them: there are as many copies as it takes for the others to fill the last-level cache between
    two products with one. Where nothing has kernels for low bits, a warning says so, and they cost what 16 bits cost.
    """
    lacking = None if why_no_triton_kernel(device, DTYPE) is None else why_no_kernels(device, DTYPE)
    if lacking is not None:
        warnings.warn(
            f"nothing has kernels for low bits here ({lacking}): they are taken to cost what 16 bits cost",
            MachineWarning,
            stacklevel=2,
        )
    asked = [*dict.fromkeys(shapes)]
    timed = [16, *(bits for bits in tried if bits != 16 and lacking is None)]
    weights = [(shape, bits) for shape in asked for bits in timed]
    copies = copies_of([bytes_of(shape, bits) for shape, bits in weights], last_level_cache(device))
    runs: list[Callable[[], object]] = []
    for (shape, bits), count in zip(weights, copies, strict=True):
        layers = nn.ModuleList(_layer(shape, bits, device, input_bits) for _ in range(count))
        prepare([layers], default_backend(device, DTYPE), device, DTYPE)
        for number, width in enumerate(WIDTHS):
            own = layers[number :: len(WIDTHS)] if count > 1 else layers  # each width has copies of its own
            runs.append(_run(own, torch.ones(width, shape[1], dtype=DTYPE, device=device)))
    medians = [statistics.median(times) for times in interleaved_seconds(runs, repeats, device)]
    seconds = dict(zip(weights, means_over_widths(medians), strict=True))
    seconds.update({(shape, bits): seconds[shape, 16] for shape in asked for bits in tried if bits not in timed})
    return seconds


def means_over_widths(medians: Sequence[float]) -> list[float]:
    """Means over the widths of each weight.

    Example:
        >>> means_over_widths([1.0, 3.0, 5.0, 5.0])
        [2.0, 5.0]
    """
    size = len(WIDTHS)
    return [statistics.mean(medians[begin : begin + size]) for begin in range(0, len(medians), size)]


def bytes_of(shape: Shape, bits: int) -> int:
    """Bytes of a weight's codes."""
    return shape[0] * shape[1] * bits // 8


def copies_of(sizes: Sequence[int], cache: int) -> list[int]:
    """How many copies of each weight there are, so that none is in the cache when its turn comes.

    A round multiplies with one copy of each weight at each width, in any order. The rounds between two products with
    one copy fill the cache; of a weight that does so alone there is one copy, for all widths.

    Args:
        sizes: of the weights, in bytes.
        cache: bytes that the cache holds.

    Example:
        >>> copies_of([40, 20, 200], cache=100), copies_of([10, 5], cache=100)
        ([4, 4, 1], [10, 10])
    """
    widths = len(WIDTHS)
    read = sum(size if size >= cache else widths * size for size in sizes)  # in a round
    rounds = 1 + math.ceil(cache / read)
    return [1 if size >= cache else widths * rounds for size in sizes]


def _layer(shape: Shape, bits: int, device: torch.device, input_bits: InputBits) -> nn.Module:
    out, inputs = shape
    linear = nn.Linear(inputs, out, bias=False, dtype=DTYPE, device=device)
    return linear if bits == 16 else LowBitLinear(linear, 8 if bits == 8 else 4, input_bits)


def _run(layers: Iterable[nn.Module], rows: Tensor) -> Callable[[], object]:
    turns = cycle([*layers])
    return lambda: next(turns)(rows)
