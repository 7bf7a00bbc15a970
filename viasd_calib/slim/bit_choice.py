"""How many bits each of several modules gets: the least divergence within a cost, exact on whole numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from viasd_calib.errors import SpecError

Number = TypeVar("Number", bound=int)
UNITS = 10_000
"""What a cost of 1 is in whole numbers; costs are rounded up, so that the target holds."""


class MeasuredBits(NamedTuple):
    """What a module with so many bits was measured to do.

    Attributes:
        kl: KL(q || q') where it alone has them, in nats a place.
        cost: share of a full pass.
    """

    kl: float
    cost: float


def choose_bits(measured: Sequence[Mapping[Number, MeasuredBits]], target_cost: float) -> list[Number]:
    """The bits of each module whose summed KL is least among all choices that cost no more than the target.

    A knapsack with one choice a module, solved by dynamic programming over costs in units of 1 / ``UNITS``. Divergences
    are taken to add up. Of equal ones the first choice that a module names is taken.

    Args:
        measured: for each module, what each number of bits does.
        target_cost: share of a full pass.

    Raises:
        SpecError: no choice costs so little.

    Example:
        >>> layers = [{16: MeasuredBits(0.0, 0.5), 8: MeasuredBits(kl, 0.25)} for kl in (0.1, 0.3)]
        >>> choose_bits(layers, 0.75)
        [8, 16]
    """
    best: dict[int, tuple[float, tuple[Number, ...]]] = {0: (0.0, ())}  # by cost so far: summed KL, and the choices
    room = math.floor(round(target_cost * UNITS, 4))
    for module in measured:
        reached: dict[int, tuple[float, tuple[Number, ...]]] = {}
        for spent, (kl, chosen) in best.items():
            for bits, one in module.items():
                cost = spent + units(one.cost)
                if cost <= room and (cost not in reached or kl + one.kl < reached[cost][0]):
                    reached[cost] = kl + one.kl, (*chosen, bits)
        best = reached
    if not best:
        least = sum(min(one.cost for one in module.values()) for module in measured)
        raise SpecError(
            f"no choice of bits brings the cost of a slim pass down to {target_cost} of a full one, the least is "
            f"{least:.3f}; raise target_cost, or let low_bit choose among fewer bits"
        )
    return [*min(best.values(), key=lambda found: found[0])[1]]


def units(cost: float) -> int:
    """A cost in whole numbers, rounded up; one that is whole but for rounding stays as it is.

    Example:
        >>> units(0.25), units(0.25001)
        (2500, 2501)
    """
    return math.ceil(round(cost * UNITS, 4))
