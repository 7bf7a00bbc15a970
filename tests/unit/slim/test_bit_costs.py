"""Products timed as they decode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from viasd_calib.errors import MachineWarning
from viasd_calib.slim import bit_costs
from viasd_calib.slim.bit_costs import product_seconds

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
    monkeypatch.setattr(bit_costs, "prepare", lambda modules, *_: prepared.extend(*modules))
    monkeypatch.setattr(bit_costs, "interleaved_seconds", lambda runs, *_: [[float(n)] for n in range(len(runs))])
    seconds = product_seconds([(16, 64)], [4, 16, 8], CPU, input_bits=8)
    assert [getattr(layer, "cost_key", None) for layer in prepared] == [None, (4, 8), (8, 8)]
    assert seconds == {((16, 64), 16): 0.5, ((16, 64), 4): 2.5, ((16, 64), 8): 4.5}
