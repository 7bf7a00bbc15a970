"""GPTQ's step: less error where inputs go together, nothing but nearest rounding where they do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from viasd_calib.errors import NumericsError
from viasd_calib.slim import gptq as gptq_module
from viasd_calib.slim.gptq import CODES, DAMPING, gptq, inverse_factor, round_by_factor
from viasd_calib.slim.low_bit import GROUP, Bits, RoundedWeight, round_weight

BITS: list[Bits] = [8, 4]
SHAPES = {"out": st.integers(1, 9), "inputs": st.integers(1, 150), "bits": st.sampled_from(BITS)}


def problem(seed: int, out: int, inputs: int, places: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight [out, in], and 2 X^T X of inputs that go together: [in, in]."""
    draw = torch.Generator().manual_seed(seed)
    count = 3 * inputs if places is None else places
    read = torch.randn(count, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    return torch.randn(out, inputs, generator=draw), 2 * read.T @ read


def error(weight: Tensor, rounded: RoundedWeight, hessian: Tensor) -> float:
    """tr(E H E^T) in float64."""
    change = (weight - rounded.plain()).double()
    return float(((change @ hessian.double()) * change).sum())


def by_inverses(weight: Tensor, hessian: Tensor, bits: Bits) -> Tensor:
    """Algorithm 1 by equation 3 of the paper as it stands, the inverse Hessian updated by elimination: [out, in]."""
    damped = hessian.double() + DAMPING[0] * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    inverse, left = damped.inverse(), weight.double().clone()
    nearest = round_weight(weight, bits)
    codes = torch.zeros_like(left)
    for column in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        group = column // GROUP if bits == 4 else 0
        step, lowest = nearest.steps[:, group].double(), nearest.lowest[:, group].double()
        codes[:, column] = ((left[:, column] - lowest) / step).round().clamp(*CODES[bits])
        off = (left[:, column] - (codes[:, column] * step + lowest)) / inverse[column, column]
        left -= off[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [1, 7, 128])
def test_it_is_the_algorithm_of_the_paper(bits: Bits, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to values that lie between two codes, where float32 may decide otherwise, and what follows from that."""
    monkeypatch.setattr(gptq_module, "BLOCK", block)
    same = []
    for seed in range(10):
        weight, hessian = problem(seed, 6, 70)
        same.append((gptq(weight, hessian, bits).codes == by_inverses(weight, hessian, bits)).float().mean())
    assert float(torch.stack(same).mean()) > 0.995


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_less_than_that_of_nearest_rounding(bits: Bits) -> None:
    """Of a single row of few weights nearly always, as each column's choice is final; else always."""
    shares: dict[int, list[float]] = {6: [], 63: [], 130: []}
    for seed, out, inputs in itertools.product(range(12), (1, 8), shares):
        weight, hessian = problem(seed, out, inputs)
        plain = error(weight, round_weight(weight, bits), hessian)
        shares[inputs].append(error(weight, gptq(weight, hessian, bits), hessian) / plain)
    assert max(*shares[63], *shares[130]) < 0.75
    assert sum(share <= 1 for share in shares[6]) >= 0.9 * len(shares[6])


def test_it_is_near_the_best_of_all_codes() -> None:
    """By trying every choice of neighbouring codes, on weights small enough for that."""
    above = {"gptq": 0.0, "nearest": 0.0}
    for seed in range(20):
        weight, hessian = problem(seed, 1, 8)
        nearest = round_weight(weight, 4)
        below = ((weight - nearest.lowest) / nearest.steps).floor()
        choices = [(below + torch.tensor(up)).clamp(0, 15) for up in itertools.product((0, 1), repeat=8)]
        best = min(error(weight, nearest._replace(codes=codes.to(torch.int8)), hessian) for codes in choices)
        above["gptq"] += error(weight, gptq(weight, hessian, 4), hessian) / best - 1
        above["nearest"] += error(weight, nearest, hessian) / best - 1
    assert above["gptq"] < 0.5 * above["nearest"]


@given(**SHAPES, seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_inputs_that_do_not_go_together_are_rounded_to_nearest(
    out: int, inputs: int, bits: Bits, seed: int, scale: float
) -> None:
    weight, _ = problem(seed, out, inputs)
    for hessian in (scale * torch.eye(inputs), torch.zeros(inputs, inputs)):
        found, wanted = gptq(weight, hessian, bits), round_weight(weight, bits)
        assert found.bits == bits
        assert all(torch.equal(one, other) for one, other in zip(found[1:], wanted[1:], strict=True))


@given(**SHAPES, seed=st.integers(0, 99), places=st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_integers_are_those_of_the_format(out: int, inputs: int, bits: Bits, seed: int, places: int) -> None:
    """Of few places too, whose Hessian has no inverse before it is damped."""
    weight, hessian = problem(seed, out, inputs, places)
    found, nearest = gptq(weight.to(torch.bfloat16), hessian, bits), round_weight(weight.to(torch.bfloat16), bits)
    least, largest = CODES[bits]
    assert found.codes.dtype == torch.int8
    assert found.codes.shape == (out, inputs)
    assert found.codes.is_contiguous()
    assert least <= int(found.codes.min())
    assert int(found.codes.max()) <= largest
    assert torch.equal(found.steps, nearest.steps)
    assert torch.equal(found.lowest, nearest.lowest)


@pytest.mark.parametrize("bits", BITS)
def test_what_never_enters_is_rounded_to_nearest(bits: Bits) -> None:
    weight, hessian = problem(0, 8, 70)
    dead = torch.tensor([3, 64, 69])
    hessian[dead] = 0
    hessian[:, dead] = 0
    found, nearest = gptq(weight, hessian, bits), round_weight(weight, bits)
    assert torch.equal(found.codes[:, dead], nearest.codes[:, dead])
    alive = [column for column in range(70) if column not in dead.tolist()]
    assert not torch.equal(found.codes[:, alive], nearest.codes[:, alive])
    assert error(weight, found, hessian) < error(weight, nearest, hessian)


def test_a_factor_serves_every_weight_that_reads_the_input() -> None:
    weight, hessian = problem(0, 12, 70)
    factor = inverse_factor(hessian)
    parts = [round_by_factor(some, 4, factor) for some in weight.split(5)]
    assert torch.equal(RoundedWeight.joined(parts).codes, gptq(weight, hessian, 4).codes)


def test_rows_may_be_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(0, 12, 70)
    wanted = gptq(weight, hessian, 4)
    monkeypatch.setattr(gptq_module, "ROUNDED_AT_ONCE", 5 * 70)
    assert torch.equal(gptq(weight, hessian, 4).codes, wanted.codes)


def test_a_hessian_that_is_not_positive_is_damped_more_and_then_refused() -> None:
    weight, _ = problem(0, 4, 2)
    slightly = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # as rounding leaves one: of eigenvalues 2.05 and -0.05
    _, upper = inverse_factor(slightly)
    torch.testing.assert_close((upper.T @ upper).inverse(), slightly + DAMPING[1] * torch.eye(2))
    for wrong in (torch.tensor([[1.0, 9.0], [9.0, 1.0]]), torch.full((2, 2), torch.nan), torch.eye(2) * torch.inf):
        with pytest.raises(NumericsError, match="not positive definite, not even with its mean diagonal added"):
            gptq(weight, wrong, 8)
