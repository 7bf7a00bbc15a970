"""Evaluating routes on some texts, by counted passes: what every method of a search calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from viasd_calib.errors import CalibrationError
from viasd_calib.replay.agreement import directly_after, slim_logits_on, text_cache
from viasd_calib.slim.cache import SharedCache
from viasd_calib.slim.cost import nothing
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.spec import Route
from viasd_calib.traces.texts import TraceText
from viasd_calib.training.losses import TrainingLoss
from viasd_calib.training.losses.kl import kl_divergence
from viasd_calib.training.search.bridges import BridgeFitter


class CachedText(NamedTuple):
    """A text, and q's keys and values on it."""

    text: TraceText
    cache: SharedCache


def cache_texts(model: RoutedModel, texts: Iterable[TraceText]) -> list[CachedText]:
    """Read with q the texts that many routes are evaluated on; its keys and values stay in memory."""
    return [CachedText(text, text_cache(model, text)) for text in texts]


class RouteEvaluator:
    """Gives the loss of routes, directly after q at the places where q wrote, until its budget is spent.

    A pass is one run of a route over all texts.

    Args:
        model: the opened verifier.
        texts: with at least one place where q wrote.
        budget: passes.
        bridges: fits the bridges that a route is evaluated with; None evaluates routes without.
        on_pass: called after every pass.
    """

    def __init__(
        self,
        model: RoutedModel,
        texts: Sequence[CachedText],
        budget: int,
        bridges: BridgeFitter | None = None,
        on_pass: Callable[[], object] = nothing,
    ) -> None:
        self.model = model
        self.texts = texts
        self.budget = budget
        self.spent = 0
        self._bridges = bridges
        self._on_pass = on_pass

    @property
    def left(self) -> int:
        """Passes that the budget still holds."""
        return self.budget - self.spent

    def need(self, passes: int) -> None:
        """Refuse at once what the budget does not hold.

        Raises:
            CalibrationError: naming the budget that is needed.
        """
        if passes > self.left:
            raise CalibrationError(
                f"this choice takes {passes} passes, {self.left} of {self.budget} are left; "
                f"raise budget to {self.spent + passes} or leave the method out"
            )

    def spend(self) -> None:
        """Count a pass.

        Raises:
            CalibrationError: the budget is spent.
        """
        self.need(1)
        self.spent += 1
        self._on_pass()

    def bridges(self, route: Route) -> nn.ModuleDict:
        """The bridges that a route is evaluated with; none where it is evaluated without."""
        return nn.ModuleDict() if self._bridges is None else self._bridges.fit(route)

    def loss(self, route: Route, of: TrainingLoss = kl_divergence) -> float:
        """Mean loss of a route over all places, for one pass.

        Raises:
            CalibrationError: the budget is spent.
        """
        self.spend()
        sublayers = sublayers_of(self.model.layers, self.model.layer_types, route, self.bridges(route))
        losses = [
            of(
                text.q_ids,
                text.q_log_probs,
                slim_logits_on(self.model, sublayers, text, cache, directly_after(text)),
            )
            for text, cache in self.texts
        ]
        return float(torch.cat(losses).mean())
