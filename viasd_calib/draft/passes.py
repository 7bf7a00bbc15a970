"""What a text waits for while it is decoded, so that the texts of a batch can wait together.

A computation on one text is a generator of type :data:`Passes`: it yields the forwards and the values that it
needs, as requests, and is sent their results. Alone, :func:`finish` runs each request as it comes; in a batch
:mod:`viasd_calib.decoding.batch` runs those of several texts at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from viasd_calib.slim.cache import CacheRow, CacheWindow, repeat_last, window_of_rows
from viasd_calib.slim.forward import RoutedModel, States

T = TypeVar("T")


class Cost(IntEnum):
    """How dear a request is."""

    READ = 0
    DRAFT = 1
    SLIM = 2
    FULL = 3


class Request(ABC, Generic[T]):
    """Something that a text waits for, with a result of type ``T``."""

    cost: ClassVar[Cost]
    """In a batch cheaper requests run first, so that texts gather at the dear ones."""

    @abstractmethod
    def run(self) -> T:
        """Do it for one text."""

    @classmethod
    def run_together(cls, requests: Sequence[Self]) -> list[T]:
        """Do it for several texts; one after the other, where a kind of request knows no better."""
        return [request.run() for request in requests]


Passes = Generator[Request[Any], Any, T]
"""A computation on one text that yields the requests it waits for, is sent their results, and returns a ``T``."""


def finish(passes: Passes[T]) -> T:
    """Run a computation on one text alone.

    Example:
        >>> def largest(values: Tensor) -> Passes[int]:
        ...     first, *rest = yield Read(values)
        ...     return max(first, *rest)
        >>> finish(largest(torch.tensor([4, 9, 6])))
        9
    """
    try:
        request = next(passes)
        while True:
            request = passes.send(request.run())
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def at_once(result: T) -> Passes[T]:
    """The computation that waits for nothing.

    Example:
        >>> finish(at_once(3))
        3
    """
    return result
    yield  # what makes it a generator


@dataclass(frozen=True)
class Read(Request[list[int]]):
    """Bring integers or flags from the device to the host; a batch waits for the device once for all its texts.

    Attributes:
        values: [n], long or bool.
    """

    cost = Cost.READ
    values: Tensor

    def run(self) -> list[int]:
        return self.values.tolist()

    @classmethod
    def run_together(cls, requests: Sequence[Self]) -> list[list[int]]:
        together = torch.cat([request.values.long() for request in requests]).tolist()
        return [together[begin:end] for begin, end in bounds([request.values.shape[0] for request in requests])]


def bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where pieces of these sizes begin and end in a row.

    Example:
        >>> bounds([2, 0, 3])
        [(0, 2), (2, 2), (2, 5)]
    """
    return list(pairwise(accumulate(sizes, initial=0)))


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
        return [PassResult(logits[begin:end], own) for (begin, end), own in zip(bounds(wanted), tapped, strict=True)]
