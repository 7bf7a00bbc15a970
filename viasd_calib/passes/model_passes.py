"""Forwards of models over tokens of a text, as requests: the full verifier's, the slim verifier's, a draft model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from viasd_calib.passes.requests import Cost, Request, ranges_of
from viasd_calib.slim.cache import CacheRow, CacheWindow, repeat_last, window_of_rows
from viasd_calib.slim.forward import RoutedModel, States


class PassResult(NamedTuple):
    """What a pass over one text's tokens gives.

    Attributes:
        logits: at the last places, as many as were wanted, [wanted, vocabulary].
        tapped: the residual stream after the tapped layers, [width, taps, hidden].
    """

    logits: Tensor
    tapped: Tensor


@dataclass(frozen=True)
class ModelPass(Request[PassResult]):
    """One forward of a model over tokens of a text.

    Attributes:
        row: the text's keys and values.
        start: position of the first token.
        ids: the tokens, [width], long; one at least.
        wanted: at how many of the last places logits are wanted; the output head runs at these alone.
        taps: after how many layers the residual stream is wanted.
    """

    model: RoutedModel
    row: CacheRow
    start: int
    ids: Tensor
    wanted: int
    taps: tuple[int, ...] = ()

    def forward(self, ids: Tensor, window: CacheWindow) -> States:
        """The model over ``ids`` ([batch, width])."""
        return self.model.full(ids, window, self.taps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's output head: [places, hidden] -> [places, vocabulary]."""
        return self.model.logits(hidden)

    def _read_out(self, hidden: Tensor) -> Tensor:
        """Logits of some places ([places, hidden]): [places, vocabulary]."""
        if hidden.shape[0] == 0:  # a prompt is read for its keys and values alone
            return hidden.new_empty((0, self.model.config.vocab_size))
        return self.logits(hidden)

    def run(self) -> PassResult:
        width = self.ids.shape[0]
        states = self.forward(self.ids[None], self.row.window(self.start, width))
        return PassResult(self._read_out(states.last[0, width - self.wanted :]), states.tapped[0])

    @classmethod
    def run_together(cls, requests: Sequence[Self]) -> list[PassResult]:
        first = requests[0]
        widths = [request.ids.shape[0] for request in requests]
        window = window_of_rows([r.row for r in requests], [r.start for r in requests], widths)
        states = first.forward(repeat_last([request.ids for request in requests]), window)
        wanted = [request.wanted for request in requests]
        ends = zip(states.last, widths, wanted, strict=True)
        places = [last[width - want : width] for last, width, want in ends]  # [wanted, hidden] each
        logits = first._read_out(torch.cat(places))  # [all that is wanted, vocabulary]
        tapped = [rows[:width] for rows, width in zip(states.tapped, widths, strict=True)]
        return [PassResult(logits[begin:end], own) for (begin, end), own in zip(ranges_of(wanted), tapped, strict=True)]


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
