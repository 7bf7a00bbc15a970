"""Products timed as they decode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from viasd_calib.errors import MachineWarning
from viasd_calib.slim import bit_costs
from viasd_calib.slim.bit_costs import copies_of, product_seconds
from viasd_calib.slim.low_bit import LowBitLinear

CPU = torch.device("cpu")


def test_without_kernels_low_bits_cost_what_sixteen_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_costs, "why_no_kernels", lambda *_: "no such processor")
    with pytest.warns(MachineWarning, match=r"nothing has kernels for low bits here \(no such processor\)"):
        seconds = product_seconds([(64, 64), (64, 64)], [8, 4], CPU, repeats=1)
    assert {*seconds} == {((64, 64), bits) for bits in (16, 8, 4)}
    assert len({*seconds.values()}) == 1
    assert seconds[(64, 64), 8] > 0


def test_with_kernels_a_layer_of_each_number_of_bits_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[nn.Module] = []
    monkeypatch.setattr(bit_costs, "why_no_kernels", lambda *_: None)
    monkeypatch.setattr(bit_costs, "last_level_cache", lambda _: 1)  # which holds none of the weights
    monkeypatch.setattr(bit_costs, "prepare", lambda modules, *_: prepared.extend(*modules))
    monkeypatch.setattr(bit_costs, "interleaved_seconds", lambda runs, *_: [[float(n)] for n in range(len(runs))])
    seconds = product_seconds([(16, 64)], [4, 16, 8], CPU, input_bits=8)
    assert [getattr(layer, "cost_key", None) for layer in prepared] == [None, (4, 8), (8, 8)]
    assert seconds == {((16, 64), 16): 0.5, ((16, 64), 4): 2.5, ((16, 64), 8): 4.5}


def test_copies_of_a_weight_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each width those of its own, so that no other width has just read them."""
    used: list[tuple[int, int]] = []

    def noted(layer: LowBitLinear, rows: Tensor) -> Tensor:
        used.append((id(layer), len(rows)))
        return rows

    monkeypatch.setattr(bit_costs, "why_no_kernels", lambda *_: None)
    monkeypatch.setattr(bit_costs, "last_level_cache", lambda _: 20_000)
    monkeypatch.setattr(bit_costs, "prepare", lambda *_: None)
    monkeypatch.setattr(LowBitLinear, "forward", noted)
    product_seconds([(64, 64)], [8], CPU, repeats=2)
    copies = copies_of([2 * 64 * 64, 64 * 64], 20_000)[1] // 2
    rounds = len(used) // 2
    assert rounds > copies == 2
    for width in bit_costs.WIDTHS:
        own = [layer for layer, rows in used if rows == width]
        assert len({*own}) == copies
        assert own == [own[number % copies] for number in range(rounds)]
    assert len({layer for layer, _ in used}) == 2 * copies


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=6), cache=st.integers(1, 1000))
def test_rounds_between_two_uses_of_a_copy_read_as_much_as_the_cache_holds(sizes: list[int], cache: int) -> None:
    copies = copies_of(sizes, cache)
    width_count = len(bit_costs.WIDTHS)
    read = sum(size if count == 1 else width_count * size for size, count in zip(sizes, copies, strict=True))
    for size, count in zip(sizes, copies, strict=True):
        assert size >= cache if count == 1 else (count // width_count - 1) * read >= cache
