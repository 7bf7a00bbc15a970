"""Linear layers of the kernels: what PyTorch gives, exact integers, and rows that do not depend on each other."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from viasd_calib.slim.fused_linear import FusedLinearPart
from viasd_calib.slim.low_bit import Bits, InputBits, LowBitLinear, RoundedWeight, round_inputs, round_weight
from viasd_calib.slim.native import linear, packing
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.native.linear import NativeLinear, native_linear, pack_low_bits
from viasd_calib.slim.native.packing import pack_rounded

LACKING = why_no_kernels(torch.device("cpu"), torch.bfloat16)
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"the kernels do not run here: {LACKING}")


def rows_of(seed: int, count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


sizes = st.tuples(st.integers(1, 70), st.integers(1, 200), st.integers(1, 40))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), size=sizes, bias=st.booleans())
def test_bfloat16_is_the_product_up_to_rounding(seed: int, size: tuple[int, int, int], bias: bool) -> None:
    out, width, rows = size
    torch.manual_seed(seed)
    linear = nn.Linear(width, out, bias=bias).bfloat16()
    inputs = rows_of(seed, rows, width)
    layer = native_linear(linear.weight, linear.bias)
    wanted = nn.functional.linear(inputs.double(), linear.weight.double(), None if not bias else linear.bias.double())
    found = layer(inputs.float())
    size_of_sums = inputs.double().abs() @ linear.weight.double().abs().T + 1
    assert ((found - wanted).abs() <= width * torch.finfo(torch.float32).eps * size_of_sums).all()
    assert layer(inputs).dtype == torch.bfloat16
    assert torch.equal(layer.plain(), linear.weight)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=sizes,
    bits=st.sampled_from([8, 4]),
    input_bits=st.sampled_from([16, 8]),
    bias=st.booleans(),
)
def test_low_bits_are_those_of_the_reference(
    seed: int, size: tuple[int, int, int], bits: Bits, input_bits: InputBits, bias: bool
) -> None:
    out, width, rows = size
    torch.manual_seed(seed)
    holder = nn.Sequential(LowBitLinear(nn.Linear(width, out, bias=bias), bits, input_bits))
    inputs = rows_of(seed, rows, width).float()
    reference = holder[0]
    wanted = reference(inputs)
    pack_low_bits([holder])
    assert isinstance(holder[0], NativeLinear)
    largest = inputs.abs() @ reference.rounded.plain().abs().T + 1
    assert ((holder[0](inputs) - wanted).abs() <= width * torch.finfo(torch.float32).eps * 2 * largest).all()


@pytest.mark.parametrize("input_bits", [16, 8])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_none_and_what_is_nearly_nothing_is_zero(bits: Bits, input_bits: InputBits) -> None:
    """In its own row alone; else a verifier that has gone wrong would go on in some number or other."""
    holder = nn.Sequential(LowBitLinear(nn.Linear(130, 20, bias=False), bits, input_bits))
    inputs = rows_of(0, 6, 130).float()
    inputs[1, 77], inputs[2, 129], inputs[3, 0] = float("nan"), float("inf"), -float("inf")
    inputs[4] *= 1e-36
    inputs[5] = 0
    reference = holder[0](inputs)
    pack_low_bits([holder])
    for found in (reference, holder[0](inputs)):
        assert found.isfinite().all(1).tolist() == [True, False, False, False, True, True]
        assert not found[4:].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_are_exact_where_they_are_largest(sign: int) -> None:
    """Kernels that add pairs of products in 16 bits would saturate here."""
    width = 4096
    codes = torch.full((16, width), 127, dtype=torch.int8)
    codes[1::2] = -127
    weight = RoundedWeight(8, codes, torch.ones(16, 1), torch.zeros(16, 1))
    inputs = torch.full((3, width), 127.0 * sign)
    found = NativeLinear(pack_rounded(weight), None, 8)(inputs)
    exact = codes.double() @ inputs[0].double()
    assert torch.equal(found, exact.float().expand(3, 16))
    assert round_inputs(inputs, 8).codes.abs().max() == 127


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 40), bits=st.sampled_from([16, 8, 4]), joint=st.booleans())
def test_a_row_depends_on_no_other_row(seed: int, rows: int, bits: int, joint: bool) -> None:
    """Bit for bit, whatever the width of the pass."""
    torch.manual_seed(seed)
    linear = nn.Linear(130, 70)
    layer: nn.Module = native_linear(linear.weight, linear.bias)
    if bits != 16:
        holder = nn.ModuleDict({"gate_proj": LowBitLinear(linear, bits), "up_proj": LowBitLinear(linear, bits)})  # type: ignore[arg-type]
        if not joint:
            del holder["up_proj"]
        pack_low_bits([holder])
        layer = holder["gate_proj"]
        assert isinstance(layer, FusedLinearPart) == joint
    inputs = rows_of(seed, rows, 130).float()
    together = layer(inputs)
    alone = torch.cat([layer(inputs[row : row + 1]) for row in range(rows)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("out", "inputs"), [(70, 130), (64, 128)])
def test_packing_some_rows_at_a_time_gives_the_same_tiles(
    bits: Bits, out: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it happens with output heads, whose last rows may fill no tile."""
    rounded = round_weight(torch.randn(out, inputs, generator=torch.Generator().manual_seed(0)), bits)
    wanted = packing.pack_rounded(rounded)
    monkeypatch.setattr(packing, "PACKED_AT_ONCE", 2 * packing.TILE)
    found = packing.pack_rounded(rounded)
    assert found[:2] == wanted[:2]
    assert all(torch.equal(one, other) for one, other in zip(found[2:], wanted[2:], strict=True))


def test_codes_go_as_they_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, also where all lie in one module: else a model would be in memory twice."""
    every = nn.ModuleList(nn.ModuleDict({"o_proj": LowBitLinear(nn.Linear(64, 16), 8)}) for _ in range(4))
    known = [weakref.ref(one["o_proj"]) for one in every]  # type: ignore[index]
    alive: list[int] = []
    joined = linear._joined

    def counted(those: Sequence[LowBitLinear]) -> NativeLinear:
        alive.append(sum(one() is not None for one in known))
        return joined(those)

    monkeypatch.setattr(linear, "_joined", counted)
    pack_low_bits([every])
    assert alive == [4, 3, 2, 1]


def test_giving_memory_back_while_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it happens with models that are not small; it happens once for each module whose codes are that many."""
    calls: list[bool] = []
    monkeypatch.setattr(linear, "FREED", 32 * 64)
    monkeypatch.setattr(linear, "give_freed_memory_back", lambda: calls.append(True))
    torch.manual_seed(0)
    plain = nn.ModuleList(nn.Sequential(LowBitLinear(nn.Linear(64, out), 8)) for out in (32, 16, 16, 8))
    inputs = rows_of(0, 3, 64)
    wanted = [layer(inputs) for layer in plain]
    pack_low_bits([plain])
    assert len(calls) == 2
    for layer, right in zip(plain, wanted, strict=True):
        torch.testing.assert_close(layer(inputs), right, rtol=0.02, atol=0.02)
