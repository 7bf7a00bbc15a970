"""Choosing a route without training: which run of layers does a bridge replace best?

Measured on SmolLM2-135M, one long run with a bridge does as well as several short ones, and the place of the run
decides: so a handful of candidates is compared, each with its bridge, on q's own texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from viasd_calib.errors import CalibrationError
from viasd_calib.replay.agreement import compare_places, directly_after, text_cache
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.cost import TOLERANCE, SublayerCosts
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.slim.parts.bridges import DEFAULT_OPTIONS, BridgeOptions, fit_bridges, token_shift_ends
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import Route
from viasd_calib.traces.texts import TraceText


def span_routes(costs: SublayerCosts, target_cost: float, always: Sequence[int], layers: int) -> list[Route]:
    """Routes that leave out one run of whole layers, just long enough for the target.

    Where narrow MLPs and a reduced head meet it by themselves, the one route that leaves out nothing.

    Args:
        always: layers that stay, from 0.

    Raises:
        CalibrationError: the target cannot be met.

    Example:
        >>> costs = SublayerCosts(torch.full((8,), 0.1), rest=0.2)
        >>> [route.mlp_skip for route in span_routes(costs, 0.6, always=[0], layers=4)]
        [[1, 2], [2, 3]]
    """
    whole = float(costs.shares.sum()) + costs.rest
    if whole <= target_cost + TOLERANCE:
        return [Route()]
    by_layer = costs.shares.view(layers, 2).sum(1).tolist()
    found: list[Route] = []
    for begin in range(layers):
        skipped: list[int] = []
        saved = 0.0
        for layer in range(begin, layers):
            if layer in always or whole - saved <= target_cost + TOLERANCE:
                break
            skipped.append(layer)
            saved += by_layer[layer]
        if whole - saved <= target_cost + TOLERANCE and skipped:
            found.append(Route(attention_skip=skipped, mlp_skip=skipped))
    if not found:
        raise CalibrationError(
            f"no run of layers brings the cost of a slim pass down to {target_cost} of a full one; raise target_cost, "
            f"or set keep_layers so that fewer than {[*always]} must stay"
        )
    return found


def route_divergences(
    model: RoutedModel, routes: Sequence[Sequence[Sublayer]], texts: Iterable[TraceText]
) -> list[float]:
    """KL(q || q') of several q' directly after q, mean over the places where q wrote, in nats.

    Args:
        routes: what each q' runs.
    """
    found: list[list[Tensor]] = [[] for _ in routes]
    for text in texts:
        cache = text_cache(model, text)
        for divergence, sublayers in zip(found, routes, strict=True):
            divergence.append(compare_places(model, sublayers, text, cache, directly_after(text)).kl)
    return [float(torch.cat(divergence).mean()) for divergence in found]


def choose_span(
    model: RoutedModel,
    routes: Sequence[Route],
    fit_on: Sequence[TraceText],
    compare_on: Sequence[TraceText],
    options: BridgeOptions = DEFAULT_OPTIONS,
) -> tuple[Route, nn.ModuleDict]:
    """The route whose bridges, fitted in closed form, leave the least KL(q || q').

    Args:
        fit_on: texts for the bridges.
        compare_on: other texts, for the choice.
        options: shape of the bridges.
    """
    fitted = [
        bridges.to(device=model.device, dtype=model.dtype)
        for bridges in fit_bridges(model, routes, fit_on, read_residuals, options)
    ]
    every = (token_shift_ends(route, bridges) for route, bridges in zip(routes, fitted, strict=True))
    model.token_shift_ends = sorted(
        {end for ends in every for end in ends}
    )  # what q's passes keep for one or the other
    kept = [
        sublayers_of(model.slim_layers, model.layer_types, route, bridges)
        for route, bridges in zip(routes, fitted, strict=True)
    ]
    divergence = route_divergences(model, kept, compare_on)
    model.token_shift_ends = ()
    best = min(range(len(routes)), key=divergence.__getitem__)
    return routes[best], fitted[best]
