"""Bits by measured divergence and cost, against all choices tried one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.errors import SpecError
from viasd_calib.slim.bit_choice import UNITS, MeasuredBits, choose_bits, units

MEASURED = st.builds(MeasuredBits, st.integers(0, 50).map(float), st.integers(1, 400).map(lambda cost: cost / UNITS))
MODULES = st.lists(st.fixed_dictionaries({16: MEASURED, 8: MEASURED, 4: MEASURED}), min_size=1, max_size=4)


@given(MODULES, st.integers(1, 1200))
def test_no_other_choice_within_the_target_has_less_divergence(
    measured: list[Mapping[int, MeasuredBits]], room: int
) -> None:
    every = [
        sum(module[bits].kl for module, bits in zip(measured, choice, strict=True))
        for choice in itertools.product((16, 8, 4), repeat=len(measured))
        if sum(units(module[bits].cost) for module, bits in zip(measured, choice, strict=True)) <= room
    ]
    if not every:
        with pytest.raises(SpecError, match="no choice of bits brings the cost"):
            choose_bits(measured, room / UNITS)
        return
    chosen = choose_bits(measured, room / UNITS)
    assert sum(units(module[bits].cost) for module, bits in zip(measured, chosen, strict=True)) <= room
    assert sum(module[bits].kl for module, bits in zip(measured, chosen, strict=True)) == min(every)
