"""The knapsack against every set of items."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.training.search.knapsack import dearest_within

ITEMS = st.lists(st.tuples(st.integers(0, 9), st.integers(-4, 20)), max_size=9)


@given(ITEMS, st.integers(0, 30))
def test_nothing_that_fits_is_worth_more(items: list[tuple[int, int]], capacity: int) -> None:
    weights, values = [weight for weight, _ in items], [float(value) for _, value in items]
    chosen = dearest_within(weights, values, capacity)
    assert chosen == sorted(set(chosen))
    assert sum(weights[place] for place in chosen) <= capacity
    best = max(
        sum(values[place] for place in places)
        for count in range(len(items) + 1)
        for places in combinations(range(len(items)), count)
        if sum(weights[place] for place in places) <= capacity
    )
    assert sum(values[place] for place in chosen) == best
