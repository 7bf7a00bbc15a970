"""The kernel of low bits, interpreted on the CPU, beside its reference; prints one JSON object: distances by case.

In its own process, with TRITON_INTERPRET=1, as Triton decides at import whether it interprets. In float16: of
bfloat16 the interpreter multiplies the bits.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any, get_args

import torch
from torch import nn

from viasd_calib.slim.low_bit import InputBits, LowBitLinear
from viasd_calib.slim.low_bit_kernel import TritonLowBitLinear

SHAPES = {"whole": (576, 192, True), "odd": (70, 33, False), "narrow": (64, 16, True)}
"""Inputs, outputs, and whether there is a bias."""
WIDTHS = (1, 3, 16, 17)


def cases() -> dict[str, tuple[int, int, str, int]]:
    """Bits of weights and inputs, shape and rows, by the case's name."""
    every = product((8, 4), get_args(InputBits), SHAPES, WIDTHS)
    return {
        f"{bits} bits, inputs {inputs}, {shape}, {rows} rows": (bits, inputs, shape, rows)
        for bits, inputs, shape, rows in every
    }


def distance(bits: Any, input_bits: Any, shape: str, rows: int) -> dict[str, float]:
    """The largest distance from the reference, as a share of the largest sum, and of a row from itself alone."""
    inputs, outputs, biased = SHAPES[shape]
    torch.manual_seed(rows)
    plain = nn.Linear(inputs, outputs, bias=biased)
    reference = LowBitLinear(plain, bits, input_bits)
    layer = TritonLowBitLinear(reference)
    given = torch.randn(2, rows, inputs).half()
    found, wanted = layer(given).float(), reference(given.float())
    most = float((given.float().abs() @ reference.rounded.plain().abs().T).max())
    alone = layer(given[:1, -1:]).float()
    return {
        "from reference": float((found - wanted).abs().max()) / most,
        "from itself": float((alone[0, 0] - found[0, -1]).abs().max()),
        "of a wrong layer": float((found + 0.01 * most - wanted).abs().max()) / most,
    }


if __name__ == "__main__":
    print(json.dumps({name: distance(*case) for name, case in cases().items()}))
