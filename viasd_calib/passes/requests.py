"""What a text waits for while it is decoded, so that the texts of a batch can wait together.

A computation on one text is a generator of type :data:`Passes`: it yields the forwards and the values that it
needs, as requests, and is sent their results. Alone, :func:`finish` runs each request as it comes; in a batch
:mod:`viasd_calib.passes.scheduling` runs those of several texts at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Cost(IntEnum):
    """Kinds of requests by what they cost, the cheapest first."""

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
        """Do it for several texts; one after the other, unless a kind of request shares work."""
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
        return [together[begin:end] for begin, end in ranges_of([request.values.shape[0] for request in requests])]


def ranges_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where pieces of these sizes begin and end in a row.

    Example:
        >>> ranges_of([2, 0, 3])
        [(0, 2), (2, 2), (2, 5)]
    """
    return list(pairwise(accumulate(sizes, initial=0)))
