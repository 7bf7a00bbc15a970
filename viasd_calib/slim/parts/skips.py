"""Skipped sublayers: attention and MLP sublayers of q that q' leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from viasd_calib.slim.parts.base import Mark, RoutePart, register
from viasd_calib.slim.plan import SlimPlan
from viasd_calib.spec import Route


@dataclass(frozen=True)
class SkippedRun:
    """Sublayers in a row that a route leaves out; layer i's attention is number 2 i, its MLP number 2 i + 1.

    Attributes:
        begin: number of the first one.
        end: number after the last one.
    """

    begin: int
    end: int

    @property
    def name(self) -> str:
        """Name of the bridge that replaces it.

        Example:
            >>> SkippedRun(5, 9).name
            'mlp_2'
        """
        return f"{('attention', 'mlp')[self.begin % 2]}_{self.begin // 2}"


def skipped_numbers(route: Route) -> list[int]:
    """Numbers of the sublayers that a route leaves out, rising.

    Example:
        >>> skipped_numbers(Route(attention_skip=[1, 2, 5], mlp_skip=[1]))
        [2, 3, 4, 10]
    """
    return sorted([2 * layer for layer in route.attention_skip] + [2 * layer + 1 for layer in route.mlp_skip])


def skipped_runs(route: Route) -> list[SkippedRun]:
    """The longest runs that a route leaves out, in the order they would have run.

    Example:
        >>> skipped_runs(Route(attention_skip=[1, 2, 5], mlp_skip=[1]))
        [SkippedRun(begin=2, end=5), SkippedRun(begin=10, end=11)]
    """
    numbers = skipped_numbers(route)
    if not numbers:
        return []
    breaks = [place for place, (one, other) in enumerate(pairwise(numbers), start=1) if other != one + 1]
    edges = [0, *breaks, len(numbers)]
    return [SkippedRun(numbers[first], numbers[last - 1] + 1) for first, last in pairwise(edges)]


@register
class Skips(RoutePart[None]):
    """Sublayers that are left out; its entries are ``attention_skip`` and ``mlp_skip`` of the route itself."""

    name = "skips"
    title = "skipped sublayers"
    contents = "which"
    fit_has_options = True

    def install(self, plan: SlimPlan, held: None = None) -> None:
        plan.skipped.update(skipped_numbers(plan.route))

    def line(self, route: Route, layers: int) -> str:
        attention, mlp = layers - len(route.attention_skip), layers - len(route.mlp_skip)
        return f"{attention} of {layers} attention and {mlp} of {layers} MLP sublayers kept"

    def drawing(self, route: Route, layers: int) -> list[Mark]:
        label = "skipped by q′"
        attention = [Mark("attention", layer, layer, label, 0.0) for layer in route.attention_skip]
        return [*attention, *(Mark("mlp", layer, layer, label, 0.0) for layer in route.mlp_skip)]
