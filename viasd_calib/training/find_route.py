"""Finding the route of a slim verifier, and the bridges over what it skips: plain functions, no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from viasd_calib.errors import CalibrationError
from viasd_calib.slim.cost import TOLERANCE, SublayerCosts
from viasd_calib.slim.parts.base import part_named
from viasd_calib.spec import LowBitWeights, Route
from viasd_calib.traces.texts import TraceText
from viasd_calib.training.options import SlimVerifierOptions
from viasd_calib.training.search.record import load_search
from viasd_calib.training.spans import choose_span, span_routes
from viasd_calib.training.student import Student


def find_route(
    student: Student, options: SlimVerifierOptions, texts: Sequence[TraceText], learned: Route | None = None
) -> tuple[Route, nn.ModuleDict | None]:
    """The route that the options ask for, with its bridges in closed form; None where they ask for none.

    Args:
        student: narrowed already, where the options ask for it.
        options: of the fit.
        texts: that bridges are fitted on.
        learned: the route that gates learned; None for a choice by span or a given route.

    Raises:
        CalibrationError: no route meets the target, or the given one is missing or of another verifier.
    """
    if options.route_choice == "whole":
        return Route(), None
    if learned is None and options.route_choice == "span":
        route, bridges = route_by_span(student, options, texts)
        return route, bridges if options.bridges else None
    route = learned or given_route(student, options)
    inputs = student.fit_inputs(route, texts)
    return route, part_named("bridges").fit(inputs, options.bridge_options) if options.bridges else None


def route_by_span(
    student: Student, options: SlimVerifierOptions, texts: Sequence[TraceText]
) -> tuple[Route, nn.ModuleDict]:
    """The run of layers whose bridge leaves the least KL(q || q') on a fifth of the texts, fitted on the others."""
    costs = student.measured_costs()
    routes = span_routes(costs, options.target_cost, student.staying, len(student.model.layers))
    compared = max(1, len(texts) // 5)
    return choose_span(student.model, routes, texts[compared:], texts[:compared], options.bridge_options)


def given_route(student: Student, options: SlimVerifierOptions) -> Route:
    """The route that a method of ``viasd search`` found.

    Raises:
        CalibrationError: the file is missing or damaged, of another verifier, or the method was not run, or its route
            has low bits.
    """
    assert options.route_file is not None, "refused when the options were made"
    assert options.route_method is not None, "refused when the options were made"
    route = load_search(Path(options.route_file)).route_of(options.route_method, student.verifier.ref)
    if route.low_bit is not None:
        raise CalibrationError(
            f"the route of {options.route_method} has low bits, which a fit rounds itself: leave out route_file and "
            f"route_method, and give --model.route_choice {'span' if route.mlp_skip else 'whole'} and --model.parts "
            f"'{{low_bit: {low_bit_words(route.low_bit)}}}'"
        )
    return route


def low_bit_words(entry: LowBitWeights) -> str:
    """Options of the part ``low_bit`` that give an entry, in one line of YAML.

    Example:
        >>> low_bit_words(LowBitWeights(mlp={"4": [2, 3]}, head=8))
        "{bits: 16, attention: {}, mlp: {'4': [2, 3]}, head: 8}"
    """
    named = (f"{kind}: {entry.model_dump()[kind]}" for kind in ("attention", "mlp"))
    return f"{{bits: 16, {', '.join(named)}, head: {entry.head or 16}}}"


def most_probable_within(chance: Tensor, always: Tensor, costs: SublayerCosts, target_cost: float) -> Tensor:
    """The sublayers that a route keeps by their chances, as long as their cost is within the target.

    Args:
        chance: that each is kept, [sublayers], 0 to 1.
        always: those that stay whatever they cost, [sublayers], bool.
        costs: shares of a full pass.
        target_cost: share of a full pass that a slim pass may cost.

    Returns:
        [sublayers], bool.

    Example:
        >>> costs = SublayerCosts(torch.full((4,), 0.2), rest=0.2)
        >>> always = torch.tensor([True, False, False, False])
        >>> most_probable_within(torch.tensor([0.1, 0.2, 0.9, 0.4]), always, costs, 0.6).tolist()
        [True, False, True, False]
    """
    order = torch.where(always, 2.0, chance).argsort(descending=True)
    within = costs.shares[order].cumsum(0) + costs.rest <= target_cost + TOLERANCE
    kept = always.clone()
    kept[order[within]] = True
    return kept
