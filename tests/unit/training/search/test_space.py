"""Which routes there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.errors import CalibrationError
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.parts.skips import skipped_numbers
from viasd_calib.training.search.space import SearchSpace


def space(target: float, always: tuple[int, ...] = ()) -> SearchSpace:
    return SearchSpace(SublayerCosts(torch.tensor([0.1, 0.2] * 3), rest=0.1), target, always)


@given(st.permutations(range(2, 6)), st.floats(0.4, 1))
def test_no_more_goes_than_the_target_takes(order: list[int], target: float) -> None:
    found = space(target, always=(0,))
    skipped = found.until_met(order)
    assert skipped == order[: len(skipped)]
    assert found.cost(skipped) <= target + 1e-5
    if skipped:
        assert found.cost(skipped[:-1]) > target


def test_a_route_names_the_sublayers_by_layer() -> None:
    found = space(0.5)
    route = found.route([5, 2, 3])
    assert (route.attention_skip, route.mlp_skip) == ([1], [1, 2])
    assert skipped_numbers(route) == [2, 3, 5]
    assert found.cost([5, 2, 3]) == pytest.approx(0.5)


@pytest.mark.parametrize(("target", "always"), [(0.3, (0,)), (0.9, (0, 1, 2))])
def test_a_target_beyond_reach_is_refused(target: float, always: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match="raise target_cost, or keep fewer layers"):
        space(target, always)
