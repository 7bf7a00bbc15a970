"""Every choice on the same texts and the same budget, compared on texts that none has seen."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from viasd_calib.choices import SearchMethod
from viasd_calib.errors import JobWarning, SpecError, TraceError
from viasd_calib.ledger import Ledger
from viasd_calib.progress import steps
from viasd_calib.replay.agreement import ComparedPlaces, compare_places, directly_after, text_cache
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.cost import SublayerCosts, relative_cost, sublayer_costs
from viasd_calib.slim.decoding_copy import decoding_cost
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.low_bit import widened_weights
from viasd_calib.slim.parts.skips import skipped_numbers
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.texts import TraceText
from viasd_calib.training.search.bridges import BridgeFitter, all_streams
from viasd_calib.training.search.evaluator import RouteEvaluator, cache_texts
from viasd_calib.training.search.methods import CHOICES
from viasd_calib.training.search.record import CONFIDENT_SHARES, FoundRoute, SearchSettings
from viasd_calib.training.search.space import SearchSpace

COST_WIDTH = 4
"""Tokens of the passes whose times are compared: those that sublayers are measured with."""


@dataclass(frozen=True)
class SearchTexts:
    """Texts that q wrote on, by what they are for; no prompt of the last is among the others."""

    bridges: Sequence[TraceText]
    evaluation: Sequence[TraceText]
    held_back: Sequence[TraceText]


def divide_texts(data: TraceDataModule, limit: int | None = None) -> SearchTexts:
    """A fifth of the training texts to evaluate on, the others for bridges, and the validation texts to compare on.

    Args:
        data: read already.
        limit: of the training texts, and of those held back; the ones with the lowest hashes are taken.

    Raises:
        TraceError: there are too few texts.
    """
    written = [text for text in data.texts if len(text.generated)]
    held_back = {text.index for text in data.validation_texts()}
    fit = sorted((text for text in written if text.index not in held_back), key=lambda text: text.prompt_sha256)
    kept = sorted((text for text in written if text.index in held_back), key=lambda text: text.prompt_sha256)
    fit, kept = fit[:limit], kept[:limit]
    if len(fit) < 2 or not kept:
        raise TraceError(
            f"{len(fit)} texts to search on and {len(kept)} to compare on are too few; capture more prompts, or change "
            "limit_texts or validation_share"
        )
    evaluated = max(1, len(fit) // 5)
    return SearchTexts(bridges=fit[evaluated:], evaluation=fit[:evaluated], held_back=kept)


def measured_space(model: RoutedModel, settings: SearchSettings, ledger: Ledger) -> SearchSpace:
    """The routes there are at what sublayers cost on this machine.

    Args:
        ledger: holds the costs where they have been measured: routes are comparable under the same ones alone.

    Raises:
        CalibrationError: no route meets the target.
    """
    layers = len(model.layers)
    always = tuple(sorted({layer % layers for layer in settings.keep_layers}))
    *shares, rest = ledger.recall("costs", list[float], lambda: _measured(model))
    return SearchSpace(SublayerCosts(torch.tensor(shares), rest), settings.target_cost, always)


def _measured(model: RoutedModel) -> list[float]:
    costs = sublayer_costs(model)
    return [*costs.shares.tolist(), costs.rest]


def compare_choices(
    model: RoutedModel, space: SearchSpace, texts: SearchTexts, settings: SearchSettings, ledger: Ledger
) -> Iterator[tuple[SearchMethod, FoundRoute]]:
    """Let one method after the other choose a route, and measure each route on the texts that were held back.

    q is read once for all methods. Each has a budget and bridges of its own, so that none profits from another's. Bits
    that cannot be chosen within the target are left out, with a warning.

    Args:
        ledger: holds what methods that are done have found; they do not search again.

    Raises:
        CalibrationError: the budget does not hold what a method takes, or a library is missing.
    """
    read = cache_texts(model, texts.evaluation)
    streams = all_streams(model, texts.bridges, read_residuals) if settings.bridges else None
    for method in settings.methods:
        with steps(method, settings.budget, "passes") as running:
            fitter = None if streams is None else BridgeFitter(model, streams, settings.bridge_rank)
            evaluator = RouteEvaluator(model, read, settings.budget, fitter, running.advance)
            choose = partial(_chosen, method, space, evaluator, texts.held_back, settings.seed)
            try:
                found = ledger.recall(method, FoundRoute, choose)
            except SpecError as error:
                warnings.warn(f"{method} is left out: {error}", JobWarning, stacklevel=2)
                continue
            running.update(found.passes, found.passes)
        yield method, found


def _chosen(
    method: SearchMethod, space: SearchSpace, evaluator: RouteEvaluator, held_back: Sequence[TraceText], seed: int
) -> FoundRoute:
    begin = time.perf_counter()
    route = CHOICES[method](space, evaluator, seed)
    seconds = time.perf_counter() - begin
    bridges, model = evaluator.bridges(route), evaluator.model.model
    routed = RoutedModel(model, route, {"bridges": bridges, "low_bit": route.low_bit})
    with widened_weights(routed.slim_networks):
        places = ComparedPlaces.joined(
            [
                compare_places(routed, routed.slim_sublayers, text, text_cache(routed, text), directly_after(text))
                for text in held_back
            ]
        )
    costs = {} if route.low_bit is not None else relative_cost(routed, widths=[COST_WIDTH])
    held = {"bridges": copy.deepcopy(bridges), "low_bit": route.low_bit}  # bridges are shared with other routes
    decoding = decoding_cost(model, route, held, widths=[COST_WIDTH])
    return FoundRoute(
        route=route,
        agreement=round(places.agreement(), 4),
        agreement_confident={share: round(places.agreement(float(share)), 4) for share in CONFIDENT_SHARES},
        kl=round(float(places.kl.mean()), 4),
        expected_cost=round(space.cost(skipped_numbers(route)), 4),
        relative_cost=round(costs[COST_WIDTH], 4) if costs else None,
        decoding_cost=decoding.measured[COST_WIDTH],
        passes=evaluator.spent,
        seconds=round(seconds, 2),
    )
