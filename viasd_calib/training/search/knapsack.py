"""The 0/1 knapsack, solved exactly by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence


def dearest_within(weights: Sequence[int], values: Sequence[float], capacity: int) -> list[int]:
    """The items that fit into a capacity together and are worth the most (Bellman 1957, Dynamic Programming).

    Takes items x capacity steps.

    Args:
        weights: of the items, not negative.
        values: of the items; one that is not above 0 is never taken.
        capacity: not negative.

    Returns:
        Places of the items, rising.

    Example:
        >>> dearest_within([3, 2, 2], [5.0, 3.0, 3.0], capacity=4)
        [1, 2]
    """
    most = [0.0] * (capacity + 1)  # by capacity
    taken: list[list[bool]] = []
    for weight, value in zip(weights, values, strict=True):
        takes = [left >= weight and most[left - weight] + value > most[left] for left in range(capacity + 1)]
        most = [most[left - weight] + value if takes[left] else most[left] for left in range(capacity + 1)]
        taken.append(takes)
    left, chosen = capacity, []
    for place in reversed(range(len(weights))):
        if taken[place][left]:
            chosen.append(place)
            left -= weights[place]
    return chosen[::-1]
