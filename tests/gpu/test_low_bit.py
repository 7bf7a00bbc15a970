"""Linear layers with weights in integers, on the device, against what their rounded weights give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.rounding import assert_near
from tests.unit.draft.test_quantised import ROUNDING, bounds, linear_of, weights
from tests.unit.slim.test_low_bit import BITS, INPUT_BITS, numbers
from viasd_calib.draft.quantised import check_device, quantise_linears
from viasd_calib.errors import ModelError
from viasd_calib.slim.low_bit import Bits, InputBits, LowBitLinear, round_inputs, round_weight
from viasd_calib.slim.low_bit_kernel import TritonLowBitLinear, why_no_triton_kernel

pytestmark = pytest.mark.gpu

INPUTS, OUTPUTS = 576, 192
"""Of a small model's layer; a multiple of what every kernel takes."""
ROWS = (1, 2, 4, 8, 16, 17, 40)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_rounded_to_the_same_integers(bits: Bits, device: torch.device) -> None:
    """Specs state the rule alone: every machine must come to the same weights."""
    weight = numbers(1, OUTPUTS, INPUTS)
    found, wanted = round_weight(weight.to(device), bits), round_weight(weight, bits)
    assert torch.equal(found.codes.cpu(), wanted.codes)
    assert torch.equal(found.steps.cpu(), wanted.steps)
    assert torch.equal(found.lowest.cpu(), wanted.lowest)


@pytest.mark.parametrize("bits", INPUT_BITS)
def test_inputs_are_rounded_to_the_same_integers(bits: InputBits, device: torch.device) -> None:
    inputs = numbers(2, 17, INPUTS)
    found, wanted = round_inputs(inputs.to(device), bits), round_inputs(inputs, bits)
    assert torch.equal(found.codes.cpu()[0], wanted.codes[0])
    assert_near(found.steps.cpu(), wanted.steps, sums=2)
    # The second code is of a difference, whose last bit hangs on whether a product and a sum are rounded as one.
    assert (found.codes.cpu() - wanted.codes).abs().max() <= 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("input_bits", INPUT_BITS)
def test_a_layer_gives_what_its_reference_gives(bits: Bits, input_bits: InputBits, device: torch.device) -> None:
    """The same integers multiplied in float64 on the host."""
    layer = LowBitLinear(linear_of(numbers(1, OUTPUTS, INPUTS)).to(device), bits, input_bits)
    for rows in ROWS:
        inputs = numbers(rows, rows, INPUTS)
        codes, steps = round_inputs(inputs.to(device), input_bits)
        plain = layer.rounded.plain().cpu().double()
        wanted = ((codes.cpu().double() @ plain.T) * steps.cpu().double()).sum(0)
        # The largest sum on the way: every product with the same sign.
        size = float((inputs.double().abs() @ plain.abs().T).max())
        assert_near(layer(inputs.to(device)).cpu(), wanted.float(), sums=INPUTS, size=size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("input_bits", INPUT_BITS)
def test_the_kernel_gives_what_its_reference_gives(bits: Bits, input_bits: InputBits, device: torch.device) -> None:
    """In bfloat16, whose rounding of the output is 2^-9 of it; a row is as alone, bit for bit."""
    lacking = why_no_triton_kernel(device, torch.bfloat16)
    if lacking is not None:
        pytest.skip(lacking)
    reference = LowBitLinear(linear_of(numbers(1, OUTPUTS, INPUTS)).to(device), bits, input_bits)
    layer = TritonLowBitLinear(reference)
    for rows in ROWS:
        inputs = numbers(rows, rows, INPUTS).to(device, torch.bfloat16)
        found, wanted = layer(inputs), reference(inputs.float())
        size = float((inputs.float().abs() @ reference.rounded.plain().abs().T).max())
        assert float((found.float() - wanted).abs().max()) <= size * (2**-9 + 2**-14)
        assert torch.equal(layer(inputs[-1:])[0], found[-1])


def test_what_a_token_gives_depends_on_no_later_token(device: torch.device) -> None:
    layer = LowBitLinear(linear_of(numbers(1, OUTPUTS, INPUTS)).to(device), 8, 8)
    inputs = numbers(3, 8, INPUTS).to(device)
    other = inputs.clone()
    other[-1] *= 50
    assert torch.equal(layer(inputs)[:-1], layer(other)[:-1])


@pytest.mark.parametrize("groups", [1, 2, 18], ids=lambda groups: f"{32 * groups}-inputs")
def test_int4_weights_of_a_draft_model(
    groups: int, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """|error| <= sum of |input| x bound of the entry, beside bfloat16's rounding of inputs and output."""
    try:
        check_device(device, "int4")
    except ModelError as error:
        pytest.skip(str(error))
    weight = weights(64, groups, seed=1, size=1.0, shift=0.3)
    layer = nn.Sequential(linear_of(weight).to(device))
    quantise_linears([layer], "int4")
    each = bounds(weight, "int4")
    for rows in ROWS:
        inputs = numbers(rows, rows, weight.shape[1])
        exact = inputs.double() @ weight.double().T
        allowed = inputs.abs() @ each.T + 2 * ROUNDING * (inputs.abs() @ (weight.abs() + each).T)
        apart = (layer(inputs.to(device)).cpu().double() - exact).abs()
        assert (apart <= allowed + 1e-30).all()
        record_property(f"share_of_bound_{rows}_rows", float((apart / (allowed + 1e-30)).max()))
