"""Choices that begin with what each sublayer's absence costs alone."""

from __future__ import annotations

import math

from viasd_calib.slim.cost import TOLERANCE
from viasd_calib.spec import Route
from viasd_calib.training.search.evaluator import RouteEvaluator
from viasd_calib.training.search.knapsack import dearest_within
from viasd_calib.training.search.space import SearchSpace

KNAPSACK_UNITS = 10_000
"""What a full pass costs in the knapsack's whole numbers; shares are rounded up."""


def ablation_losses(space: SearchSpace, evaluator: RouteEvaluator) -> dict[int, float]:
    """KL(q || q') where one sublayer alone is left out, by its number; one pass each.

    Raises:
        CalibrationError: the budget does not hold them all.
    """
    evaluator.need(len(space.free))
    return {number: evaluator.loss(space.route([number])) for number in space.free}


def ablation_order(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """Sublayers go in the order of their ablation losses, the least one first, until the target is met."""
    losses = ablation_losses(space, evaluator)
    return space.route(space.until_met(sorted(losses, key=losses.__getitem__)))


def knapsack(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """The sublayers with the least summed ablation loss among all that meet the target under the measured cost."""
    losses = ablation_losses(space, evaluator)
    allowed = space.target_cost - space.cost(space.free) + TOLERANCE / 2  # for sublayers that are kept
    # Up, so that the target holds; but a share that is a whole number but for float32 stays that number.
    weights = [math.ceil(round(space.share(number) * KNAPSACK_UNITS, 4)) for number in space.free]
    capacity = max(0, math.floor(allowed * KNAPSACK_UNITS))
    kept = {space.free[place] for place in dearest_within(weights, [*losses.values()], capacity)}
    return space.route(number for number in space.free if number not in kept)


def greedy_removal(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """Again and again the sublayer goes whose absence adds the least KL(q || q') per cost, until the target is met.

    Trying all that are left at every step takes hundreds of passes. So a step tries those alone that added the least
    when they were tried last, as many as the budget holds for each of the steps to come (after the lazy greedy
    algorithm, Minoux 1978).
    """
    alone = ablation_losses(space, evaluator)
    added = {number: loss / space.share(number) for number, loss in alone.items()}  # per cost, when last tried
    first = min(added, key=added.__getitem__)
    skipped, loss = [first], alone[first]
    while not space.meets(skipped):
        left = sorted(added.keys() - set(skipped), key=lambda number: (added[number], number))
        tried = left[: evaluator.left // _steps_to_come(space, skipped, left)]
        found = {number: evaluator.loss(space.route([*skipped, number])) for number in tried}
        added.update({number: (after - loss) / space.share(number) for number, after in found.items()})
        best = min(tried or left[:1], key=added.__getitem__)
        skipped.append(best)
        loss = found.get(best, loss)
    return space.route(skipped)


def _steps_to_come(space: SearchSpace, skipped: list[int], left: list[int]) -> int:
    """How many more sublayers must go, were all that are left of mean cost."""
    mean = sum(space.share(number) for number in left) / len(left)
    return max(1, math.ceil((space.cost(skipped) - space.target_cost) / mean))
