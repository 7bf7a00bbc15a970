"""Choices that ask for the place of a layer alone, or for chance."""

from __future__ import annotations

import random

from viasd_calib.spec import Route
from viasd_calib.training.search.evaluator import RouteEvaluator
from viasd_calib.training.search.space import SearchSpace, whole
from viasd_calib.training.spans import span_routes


def best_random(space: SearchSpace, evaluator: RouteEvaluator, seed: int) -> Route:
    """The best of as many random routes as the budget holds: sublayers go in a random order until the target is met."""
    draw = random.Random(seed)
    routes = [space.route(space.until_met(draw.sample(space.free, len(space.free)))) for _ in range(evaluator.left)]
    return min(routes, key=evaluator.loss)


def evenly_spaced(space: SearchSpace, _evaluator: RouteEvaluator, _seed: int) -> Route:
    """Whole layers at even distances, as few as the target takes; no pass."""
    layers = space.free_layers
    for count in range(1, len(layers)):
        chosen = [layers[int((place + 0.5) * len(layers) / count)] for place in range(count)]
        if space.meets(whole(chosen)):
            return space.route(whole(chosen))
    return space.route(space.free)


def best_span(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """The one run of whole layers that leaves the least KL(q || q'), as ``viasd fit`` takes it by default."""
    routes = span_routes(space.costs, space.target_cost, space.always, space.layers)
    evaluator.need(len(routes))
    return min(routes, key=evaluator.loss)
