"""Weights and inputs in integers: how far off they are, and that a token depends on itself alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from viasd_calib.slim import low_bit
from viasd_calib.slim.low_bit import (
    FINE_STEPS,
    Bits,
    InputBits,
    LowBitLinear,
    RoundedWeight,
    round_inputs,
    round_weight,
    widened_weights,
)

BITS: list[Bits] = [8, 4]
INPUT_BITS: list[InputBits] = [16, 8]


def numbers(seed: int, *shape: int) -> Tensor:
    """Random numbers, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp() ** 3


@given(seed=st.integers(0, 10**6), out=st.integers(1, 20), inputs=st.integers(1, 150), bits=st.sampled_from(BITS))
def test_a_weight_is_off_by_half_a_step_at_most(seed: int, out: int, inputs: int, bits: Bits) -> None:
    weight = numbers(seed, out, inputs)
    rounded = round_weight(weight, bits)
    size = inputs if bits == 8 else 64
    half = (rounded.steps / 2).repeat_interleave(size, 1)[:, :inputs]
    largest = weight.abs().max()
    assert ((rounded.plain() - weight).abs() <= half + 4 * torch.finfo(torch.float32).eps * largest).all()
    assert rounded.codes.min() >= (-127 if bits == 8 else 0)
    assert rounded.codes.max() <= (127 if bits == 8 else 15)


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_are_all_alike_stay(bits: Bits) -> None:
    assert torch.equal(round_weight(torch.zeros(3, 70), bits).plain(), torch.zeros(3, 70))
    torch.testing.assert_close(round_weight(torch.full((3, 70), -0.3), bits).plain(), torch.full((3, 70), -0.3))


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), bits=st.sampled_from(INPUT_BITS))
def test_an_input_is_off_by_half_a_step_at_most(seed: int, rows: int, bits: InputBits) -> None:
    inputs = numbers(seed, rows, 90)
    codes, steps = round_inputs(inputs, bits)
    top = inputs.abs().amax(1, keepdim=True)
    half = top / 127 / 2 / (FINE_STEPS if bits == 16 else 1)
    assert (((codes * steps).sum(0) - inputs).abs() <= half + 4 * torch.finfo(torch.float32).eps * top).all()
    assert codes.abs().max() <= 127


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("input_bits", INPUT_BITS)
def test_a_layer_gives_what_its_rounded_weight_gives(bits: Bits, input_bits: InputBits) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 20)
    inputs = numbers(3, 2, 5, 96)
    layer = LowBitLinear(linear, bits, input_bits)
    wanted = nn.functional.linear(inputs, layer.rounded.plain(), linear.bias)
    found = layer(inputs)
    assert found.shape == (2, 5, 20)
    # Half a step of each of 96 inputs, times the largest weight.
    off = inputs.abs().amax() / 127 / 2 / (FINE_STEPS if input_bits == 16 else 1)
    bound = float(off * linear.weight.detach().abs().sum(1).max()) + 1e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound)


class OneStepForAll(LowBitLinear):
    """The same with one step a tensor of inputs: what may not be."""

    def forward(self, inputs: Tensor) -> Tensor:
        step = inputs.abs().max() / 127
        return nn.functional.linear((inputs / step).round() * step, self.rounded.plain())


@pytest.mark.parametrize("input_bits", INPUT_BITS)
def test_what_a_token_gives_depends_on_no_other_token(input_bits: InputBits) -> None:
    """The same test fails for a layer with one step a tensor."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 16, bias=False)
    inputs = numbers(5, 4, 64)
    other = inputs.clone()
    other[-1] *= 50
    own, shared = LowBitLinear(linear, 8, input_bits), OneStepForAll(linear, 8)
    assert torch.equal(own(inputs)[:-1], own(other)[:-1])
    assert not torch.equal(shared(inputs)[:-1], shared(other)[:-1])


def test_memory_is_counted_in_bits() -> None:
    linear = nn.Linear(128, 32)
    assert LowBitLinear(linear, 8).memory() == 128 * 32 + 32 * 4
    assert LowBitLinear(linear, 4).memory() == 128 * 32 // 2 + 32 * 2 * 8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("at_once", [1, 70, 3 * 96, 10**6])
def test_rounding_some_rows_at_a_time_gives_the_same_codes(
    bits: Bits, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = numbers(0, 37, 96)
    wanted = round_weight(weight, bits)
    monkeypatch.setattr(low_bit, "ROUNDED_AT_ONCE", at_once)
    found = round_weight(weight, bits)
    assert found.bits == wanted.bits
    assert all(torch.equal(one, other) for one, other in zip(found[1:], wanted[1:], strict=True))


def widened_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of its rows whenever a weight, or a part of one, is widened from now on."""
    widened: list[int] = []
    plain = RoundedWeight.plain

    def noted(weight: RoundedWeight) -> Tensor:
        widened.append(weight.codes.shape[0])
        return plain(weight)

    monkeypatch.setattr(RoundedWeight, "plain", noted)
    return widened


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 20, 69])
def test_a_large_layer_is_widened_part_by_part(bits: Bits, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its parts are held or not, it gives the same bits; and what it gives in one part, but for roundings."""
    torch.manual_seed(0)
    layer, inputs = LowBitLinear(nn.Linear(96, 70), bits), numbers(4, 5, 96)
    whole = layer(inputs)
    monkeypatch.setattr(low_bit, "WIDENED_AT_ONCE", rows * 96 + 95)
    widened = widened_rows(monkeypatch)
    found = layer(inputs)
    assert max(widened) == rows
    assert sum(widened) == 70
    torch.testing.assert_close(found, whole)
    with widened_weights([layer]):
        assert torch.equal(layer(inputs), found)


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_widened_once_within_the_limit_and_give_the_same_bits(
    bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(LowBitLinear(nn.Linear(96, 70), bits), LowBitLinear(nn.Linear(70, 20), bits))
    inputs = numbers(4, 5, 96)
    wanted = layers(inputs)
    widened = widened_rows(monkeypatch)
    with widened_weights([layers, layers[0]], limit=4 * 96 * 70 + 100):  # the second is too large for what is left
        found = [layers(inputs) for _ in range(3)]
    assert widened == [70, 20, 20, 20]
    assert all(torch.equal(one, wanted) for one in found)
    layers(inputs)
    assert widened[4:] == [70, 20]
