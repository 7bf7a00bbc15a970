"""Choosing a route without training: which run of layers does a bridge replace best?

Measured on SmolLM2-135M, one long run with a bridge does as well as several short ones, and the place of the run
decides: so a handful of candidates is judged, each with its bridge, on q's own texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from viasd_calib.errors import CalibrationError
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.forward import RoutedModel, Sublayer, sublayers_of
from viasd_calib.spec import Route
from viasd_calib.traces.data import TraceText
from viasd_calib.training.bridge_fit import fit_bridges
from viasd_calib.training.objectives import top_k_tail_kl
from viasd_calib.training.student import run_starts, student_states
from viasd_calib.training.teacher import read_text


@dataclass(frozen=True)
class Judgement:
    """How well a q' speaks for q on some texts.

    Attributes:
        kl: KL(q || q') over q's traced top k and the rest, mean over generated places, in nats.
        agreement: share of generated places where both choose the same token.
    """

    kl: float
    agreement: float


def span_routes(costs: SublayerCosts, target_cost: float, always: Sequence[int], layers: int) -> list[Route]:
    """Routes that leave out one run of whole layers, just long enough for the target.

    Args:
        always: layers that stay, from 0.

    Raises:
        CalibrationError: the target cannot be met.

    Example:
        >>> costs = SublayerCosts(torch.full((8,), 0.1), rest=0.2)
        >>> [route.mlp_skip for route in span_routes(costs, 0.6, always=[0], layers=4)]
        [[1, 2], [2, 3]]
    """
    by_layer = costs.shares.view(layers, 2).sum(1).tolist()
    found: list[Route] = []
    for begin in range(layers):
        skipped: list[int] = []
        saved = 0.0
        for layer in range(begin, layers):
            if layer in always or 1 - saved <= target_cost + 1e-6:
                break
            skipped.append(layer)
            saved += by_layer[layer]
        if 1 - saved <= target_cost + 1e-6 and skipped:
            found.append(Route(attention_skip=skipped, mlp_skip=skipped))
    if not found:
        raise CalibrationError(
            f"no run of layers brings the cost of a slim pass to {target_cost}; raise target_cost, or keep fewer layers"
        )
    return found


@torch.no_grad()
def judge_route(
    model: RoutedModel, sublayers: Sequence[Sublayer], texts: Sequence[TraceText], max_run: int = 1
) -> Judgement:
    """How well q' speaks for q, reading q's cache, at the places where q wrote.

    Args:
        sublayers: what q' runs.
        max_run: longest run of pending places; 1 judges q' directly behind q.
    """
    kl: list[Tensor] = []
    hits: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for text in texts:
        ids = text.ids[None, :-1].to(model.device)
        _, cache = read_text(model, ids)
        begin = text.prompt_length - 1
        starts = run_starts(ids.shape[1], max_run, generator).to(model.device)
        states = student_states(model, sublayers, ids, cache, starts, begin=begin)
        logits = model.logits(states[0]).float().cpu()  # [n, vocabulary]
        kl.append(top_k_tail_kl(text.q_ids, text.q_log_probs, logits))
        hits.append(logits.argmax(-1) == text.q_ids[:, 0])
    return Judgement(float(torch.cat(kl).mean()), float(torch.cat(hits).float().mean()))


def choose_span(
    model: RoutedModel,
    routes: Sequence[Route],
    fit_on: Sequence[TraceText],
    judge_on: Sequence[TraceText],
    rank: int | None = None,
) -> tuple[Route, nn.ModuleDict]:
    """The route whose bridges, fitted in closed form, leave the least KL(q || q').

    Args:
        fit_on: texts for the bridges.
        judge_on: other texts, for the choice.
        rank: of the bridges; None for full ones.
    """
    fitted = fit_bridges(model, routes, fit_on, rank)

    def kl(place: int) -> float:
        bridges = fitted[place].to(device=model.device, dtype=model.dtype)
        kept = sublayers_of(model.layers, model.layer_types, routes[place], bridges)
        return judge_route(model, kept, judge_on).kl

    best = min(range(len(routes)), key=kl)
    return routes[best], fitted[best]
