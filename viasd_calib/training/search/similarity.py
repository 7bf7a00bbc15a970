"""The choice by hidden states: a run of layers that hardly turns the residual stream is hardly missed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.parts.base import generated_residuals
from viasd_calib.spec import Route
from viasd_calib.training.search.evaluator import RouteEvaluator
from viasd_calib.training.search.space import SearchSpace
from viasd_calib.training.spans import span_routes


def most_alike(space: SearchSpace, evaluator: RouteEvaluator, _seed: int) -> Route:
    """The run of whole layers whose input and output are most alike, by cosine; one pass, of q.

    Gromov et al. 2024 (arXiv 2403.17887, section 3.2) take the run of least angle at the last token of each text,
    ShortGPT (arXiv 2403.03853) scores single layers by their mean cosine. Here it is the mean cosine of a run over all
    places where q wrote.
    """
    if space.meets([]):
        return space.route([])
    routes = span_routes(space.costs, space.target_cost, space.always, space.layers)
    evaluator.spend()
    alike = cosines(evaluator)
    return max(routes, key=lambda route: float(alike[route.mlp_skip[0], route.mlp_skip[-1] + 1]))


def cosines(evaluator: RouteEvaluator) -> Tensor:
    """Mean cosine of the residual streams that enter two layers; the last one is the end: [layers + 1, layers + 1]."""
    layers = len(evaluator.model.layers)
    numbers = range(0, 2 * layers + 1, 2)
    total, places = torch.zeros(layers + 1, layers + 1), 0
    for text, _ in evaluator.texts:
        unit = functional.normalize(
            generated_residuals(evaluator.model, text, numbers, read_residuals).cpu(), dim=-1
        )  # [n, layers + 1, hidden]
        total += torch.einsum("nah,nbh->ab", unit, unit)
        places += unit.shape[0]
    return total / places
