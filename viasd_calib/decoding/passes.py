"""The verifiers' passes over a text, as requests."""

from __future__ import annotations

from torch import Tensor

from viasd_calib.draft.passes import Cost, ModelPass
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import States


class FullPass(ModelPass):
    """A pass of q."""

    cost = Cost.FULL


class SlimPass(ModelPass):
    """A pass of q'."""

    cost = Cost.SLIM

    def forward(self, ids: Tensor, window: CacheWindow) -> States:
        return self.model.slim(ids, window, self.taps)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.slim_logits(hidden)
