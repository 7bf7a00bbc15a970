"""Verifiers that are clocks: what they run moves the time, so that measured costs are known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.plan import Sublayer


class MlpClock(RoutedModel):
    """A verifier whose MLP sublayers alone take time; in place of the module ``time`` where costs are measured."""

    now = 0.0

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def seconds_of(self, sublayer: Sublayer) -> float:
        """What an MLP sublayer takes."""
        raise NotImplementedError

    def step(self, sublayer: Sublayer, hidden: Tensor, inputs: Any) -> Tensor:
        if sublayer.kind == "mlp":
            self.now += self.seconds_of(sublayer)
        return super().step(sublayer, hidden, inputs)
