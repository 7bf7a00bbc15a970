"""Bridges for the routes of a search, which are found one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.least_squares import LeastSquares
from viasd_calib.slim.parts.base import Replay, WrittenText, generated_residuals
from viasd_calib.slim.parts.bridges import Bridge, add_examples, set_least_squares
from viasd_calib.slim.parts.skips import SkippedRun, skipped_runs
from viasd_calib.spec import Route

KEPT_BRIDGES = 256
"""Fitted bridges that a search keeps for routes to come; one of SmolLM2-135M takes 1.3 MB."""


class BridgeFitter:
    """Fits bridges for routes that are found one after another.

    :func:`~viasd_calib.slim.parts.bridges.fit_bridges` does so for routes known ahead.

    A run that several routes leave out is fitted once, and they share its bridge. Bridges have no token shift: a
    search would have to keep q's stream after every run that it may come to try.

    Args:
        model: what the bridges are for.
        streams: q's residual stream before each sublayer and at the end, as :func:`all_streams` gives it.
        rank: of the maps; None for full ones.
    """

    def __init__(self, model: RoutedModel, streams: Sequence[Tensor], rank: int | None = None) -> None:
        self._model = model
        self._streams = streams
        self._rank = rank
        self._kept: dict[SkippedRun, Bridge] = {}

    def fit(self, route: Route) -> nn.ModuleDict:
        """The bridges of a route, by name, ready to run; they are shared, so no one trains them."""
        return nn.ModuleDict({run.name: self._bridge(run) for run in skipped_runs(route)})

    def _bridge(self, run: SkippedRun) -> Bridge:
        if run not in self._kept:
            if len(self._kept) == KEPT_BRIDGES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[run] = self._fit_run(run)
        return self._kept[run]

    def _fit_run(self, run: SkippedRun) -> Bridge:
        hidden = self._model.config.hidden_size
        problem = LeastSquares(hidden + 1, hidden)
        add_examples(problem, self._streams[run.begin], self._streams[run.end])
        bridge = Bridge(hidden, self._rank)
        set_least_squares(bridge, problem, self._rank)
        return bridge.to(device=self._model.device, dtype=self._model.dtype).requires_grad_(False)


def all_streams(model: RoutedModel, texts: Iterable[WrittenText], replay: Replay) -> list[Tensor]:
    """q's residual stream before each sublayer and at the end: [sublayers + 1] of [places, hidden], on the host.

    A place takes (sublayers + 1) x hidden x 4 bytes: 140 kB for SmolLM2-135M.
    """
    numbers = range(len(model.full_sublayers) + 1)
    read = torch.cat([generated_residuals(model, text, numbers, replay).cpu() for text in texts])
    return [stream.contiguous() for stream in read.unbind(1)]
