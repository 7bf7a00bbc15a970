"""The Triton kernel of low bits: interpreted against its reference, and compiled for GPUs that are not there."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.low_bit_kernel_cases import cases
from tests.triton_tools import assert_is_for, compiled_for, fresh_module, in_a_new_process, needs_triton
from viasd_calib.slim.low_bit import Bits, LowBitLinear
from viasd_calib.slim.low_bit_kernel import OUTPUTS, ROWS, WARPS, packed_codes, use_kernel, why_no_triton_kernel

ROUNDING = 2**-11
"""Of float16, which outputs are rounded to; sums in float32 add little to it."""


@functools.cache
def interpreted() -> dict[str, dict[str, float]]:
    """Distances of the interpreted kernel, by case."""
    printed = in_a_new_process(["-W", "ignore", "-m", "tests.low_bit_kernel_cases"], TRITON_INTERPRET="1")
    found: dict[str, dict[str, float]] = json.loads(printed)
    return found


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", cases())
def test_the_kernel_gives_what_its_reference_gives(name: str) -> None:
    """Inputs of 16 bits are taken as they are, where the reference has two codes of them: 2^-14 of the largest."""
    found = interpreted()[name]
    assert found["from reference"] <= ROUNDING + 2**-14
    assert found["of a wrong layer"] > ROUNDING + 2**-14


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", cases())
def test_a_row_is_as_alone(name: str) -> None:
    assert interpreted()[name]["from itself"] == 0


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("inputs", ["bf16", "fp16"])
@pytest.mark.parametrize(("bits", "codes"), [(8, "*i8"), (4, "*u8")])
def test_it_compiles_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int, codes: str, inputs: str, capability: int
) -> None:
    module = fresh_module(monkeypatch, tmp_path, "viasd_calib.slim.low_bit_kernel")
    pointers = dict.fromkeys(("steps", "lowest", "scales"), "*fp32") | dict.fromkeys(
        ("inputs", "bias", "out"), f"*{inputs}"
    )
    constants: dict[str, Any] = {"BITS": bits, "HAS_BIAS": True, "HAS_SCALES": True, "ROWS": ROWS, "OUTPUTS": OUTPUTS}
    even = ("in_features", "out_features")
    compiled = compiled_for(capability, module.multiply_codes, pointers | {"weight": codes}, constants, WARPS, even)
    assert_is_for(compiled, capability)
    assert "mma" in compiled.asm["ptx"]  # the tensor cores multiply


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_codes_hold_every_code(bits: Bits) -> None:
    layer = LowBitLinear(nn.Linear(130, 5), bits)
    packed = packed_codes(layer.rounded).int()
    if bits == 4:
        halves = packed.unflatten(1, (-1, 32))
        packed = torch.cat([halves & 15, halves >> 4], 2).flatten(1)
    assert packed.shape == (5, 192)
    assert torch.equal(packed[:, :130], layer.rounded.codes.int())


def test_layers_are_exchanged_where_they_are() -> None:
    inner = nn.Sequential(LowBitLinear(nn.Linear(64, 16), 8), nn.Linear(16, 16))
    use_kernel([inner])
    assert [type(one).__name__ for one in inner] == ["TritonLowBitLinear", "Linear"]


def test_a_device_without_the_kernel_has_a_reason() -> None:
    assert why_no_triton_kernel(torch.device("cpu"), torch.bfloat16) == "device cpu is no CUDA device"
