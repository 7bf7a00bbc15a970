"""The routes that may be chosen: some layers always stay, and the measured cost meets a target."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from viasd_calib.errors import CalibrationError
from viasd_calib.slim.cost import TOLERANCE, SublayerCosts
from viasd_calib.spec import Route


@dataclass(frozen=True)
class SearchSpace:
    """Routes whose measured cost, bridges left out, is at most a target.

    Sublayers are numbered in the order they run: layer i's attention is 2 i, its MLP 2 i + 1.

    Attributes:
        costs: measured shares of a full pass.
        target_cost: what a slim pass may cost.
        always: layers whose sublayers stay, from 0.

    Raises:
        CalibrationError: no route meets the target.

    Example:
        >>> import torch
        >>> space = SearchSpace(SublayerCosts(torch.full((6,), 0.15), rest=0.1), 0.75, always=(0,))
        >>> space.free
        [2, 3, 4, 5]
        >>> route = space.route(space.until_met([5, 2, 4]))
        >>> route.attention_skip, route.mlp_skip
        ([1], [2])
    """

    costs: SublayerCosts
    target_cost: float
    always: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least = self.cost(self.free)
        if not self.free or least > self.target_cost + TOLERANCE:
            raise CalibrationError(
                f"no route brings the cost of a slim pass to {self.target_cost}: what always stays costs {least:.3f}; "
                "raise target_cost, or keep fewer layers"
            )

    @property
    def layers(self) -> int:
        """Decoder layers of the verifier."""
        return len(self.costs.shares) // 2

    @property
    def free(self) -> list[int]:
        """Numbers of the sublayers that may be left out, rising."""
        return [number for number in range(2 * self.layers) if number // 2 not in self.always]

    @property
    def free_layers(self) -> list[int]:
        """Layers that may be left out whole, rising."""
        return [layer for layer in range(self.layers) if layer not in self.always]

    def share(self, number: int) -> float:
        """Cost of one sublayer, as a share of a full pass."""
        return float(self.costs.shares[number])

    def cost(self, skipped: Collection[int]) -> float:
        """Cost of a slim pass without these sublayers, as a share of a full pass; bridges are not counted."""
        kept = [number for number in range(2 * self.layers) if number not in skipped]
        return float(self.costs.shares[kept].sum()) + self.costs.rest

    def meets(self, skipped: Collection[int]) -> bool:
        """Whether the target is met without these sublayers."""
        return self.cost(skipped) <= self.target_cost + TOLERANCE

    def until_met(self, order: Iterable[int]) -> list[int]:
        """Sublayers to leave out: the first ones of an order, as many as the target takes."""
        skipped: list[int] = []
        for number in order:
            if self.meets(skipped):
                break
            skipped.append(number)
        return skipped

    def route(self, skipped: Iterable[int]) -> Route:
        """The route that leaves these sublayers out."""
        rising = sorted(skipped)
        return Route(
            attention_skip=[number // 2 for number in rising if number % 2 == 0],
            mlp_skip=[number // 2 for number in rising if number % 2 == 1],
        )


def whole(layers: Iterable[int]) -> list[int]:
    """Numbers of both sublayers of these layers.

    Example:
        >>> whole([0, 3])
        [0, 1, 6, 7]
    """
    return [number for layer in layers for number in (2 * layer, 2 * layer + 1)]
