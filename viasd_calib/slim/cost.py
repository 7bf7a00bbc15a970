"""What passes and sublayers cost, measured on the machine at hand."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.slim.plan import Sublayer

CONTEXT = 128
"""Cached tokens before the timed ones."""
WARM_UP = 2
"""Rounds before the timed ones; what only a first call costs falls into them."""

TOLERANCE = 1e-6
"""What a cost may exceed its target by: rounding of float32 shares."""


@dataclass(frozen=True)
class SublayerCosts:
    """Shares of a full pass.

    ``shares`` and ``rest`` sum to 1, or to less where q' has cheaper sublayers or a head of its own.

    Attributes:
        shares: of each sublayer as q' would run it, in the order they run, [sublayers].
        rest: of what a slim pass does beside its sublayers (embedding, norm, its head).
    """

    shares: Tensor
    rest: float


def nothing() -> None:
    """Do nothing."""


def interleaved_seconds(
    runs: Sequence[Callable[[], object]],
    repeats: int,
    device: torch.device,
    after_each: Callable[[], object] = nothing,
) -> list[list[float]]:
    """Times of several functions, interleaved so that drift strikes all alike: a list of ``repeats`` for each.

    A round calls each function once, in an order drawn anew, so that none always follows the same other.

    Args:
        repeats: timed rounds; ``WARM_UP`` untimed ones come before.
        device: waited for before the clock is read.
        after_each: called after every call of a function, outside the time taken.
    """
    order = list(range(len(runs)))
    draw = random.Random(0)
    seconds: list[list[float]] = [[] for _ in runs]
    for round_number in range(WARM_UP + repeats):
        draw.shuffle(order)
        for place in order:
            begin = time.perf_counter()
            runs[place]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - begin
            if round_number >= WARM_UP:
                seconds[place].append(taken)
            after_each()
    return seconds


def median_seconds(runs: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median time of each of several functions, measured by :func:`interleaved_seconds`."""
    return [statistics.median(kept) for kept in interleaved_seconds(runs, repeats, device)]


@torch.no_grad()
def sublayer_costs(model: RoutedModel, width: int = 4, repeats: int = 15) -> SublayerCosts:
    """Measure what attention and MLP sublayers, and the rest of a slim pass, cost: as shares of a full pass.

    Of sublayers with equal keys (:attr:`~viasd_calib.slim.plan.Sublayer.cost_key`) one is timed, the nearest to the
    middle: a model's layers are of one shape.

    Args:
        model: its route does not matter, modules that its parts exchanged and its head do.
        width: of both passes, in tokens.
    """
    cache = model.new_cache(CONTEXT + width)
    window = CacheWindow(cache, CONTEXT, width, CONTEXT + width)
    ids = torch.zeros(1, width, dtype=torch.long, device=model.device)
    hidden = model.embed(ids)
    inputs = model.attention_inputs(hidden, window.positions(), window.mask, window)
    candidates = sublayers_of(model.slim_layers, model.layer_types)
    middle = len(model.layers) // 2
    by_distance = sorted([*model.full_sublayers, *candidates], key=lambda one: abs(one.index - middle), reverse=True)
    chosen = {sublayer.cost_key: sublayer for sublayer in by_distance}  # the nearest one comes last, and stays

    def run(sublayer: Sublayer) -> Callable[[], object]:
        return lambda: model.step(sublayer, hidden, inputs)

    def rest(head: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: head(model.final_norm(model.embed(ids)))

    runs = [*map(run, chosen.values()), rest(model.logits), rest(model.slim_logits)]
    *each, full_rest, slim_rest = median_seconds(runs, repeats, model.device)
    seconds = dict(zip(chosen, each, strict=True))
    total = sum(seconds[sublayer.cost_key] for sublayer in model.full_sublayers) + full_rest
    shares = torch.tensor([seconds[sublayer.cost_key] for sublayer in candidates], dtype=torch.float32) / total
    return SublayerCosts(shares, slim_rest / total)


@torch.no_grad()
def relative_cost(model: RoutedModel, widths: Sequence[int] = (1, 4, 8), repeats: int = 15) -> dict[int, float]:
    """Time of a slim pass over that of a full pass of the same width, head included, by width."""
    measured: dict[int, float] = {}
    for width in widths:
        cache = model.new_cache(CONTEXT + width)
        window = CacheWindow(cache, CONTEXT, width, CONTEXT + width)
        ids = torch.zeros(1, width, dtype=torch.long, device=model.device)

        def slim(ids: Tensor = ids, window: CacheWindow = window) -> Tensor:
            return model.slim_logits(model.slim(ids, window).last)

        def full(ids: Tensor = ids, window: CacheWindow = window) -> Tensor:
            return model.logits(model.full(ids, window).last)

        slim_seconds, full_seconds = median_seconds([slim, full], repeats, model.device)
        measured[width] = slim_seconds / full_seconds
    return measured
