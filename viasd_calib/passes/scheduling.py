"""Computations on several texts, run together: requests of one kind share a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from viasd_calib.passes.requests import Passes, Request


def run_together(texts: Sequence[Passes[Any]]) -> Iterator[list[int]]:
    """Run computations on several texts, forward by forward.

    In each turn one kind of request runs, for every text that waits for it: the cheapest kind that any text waits
    for. So texts gather at the dear passes: a drafter's step costs little and runs for few, while the text that has
    its block already waits for the others, and q runs once for all of them. No text waits for ever, since the
    others draft no longer than a block and keep no more than so many tokens pending before they need q too.
    Likewise values are read for all texts of a pass at once, before any of them goes on.

    Args:
        texts: the computations, in the order of their rows.

    Yields:
        After a turn in which computations came to their end: the places of those.

    Example:
        >>> import torch
        >>> from viasd_calib.passes.requests import Read
        >>> def countdown(number: int) -> Passes[None]:
        ...     while number:
        ...         (number,) = yield Read(torch.tensor([number - 1]))
        >>> list(run_together([countdown(3), countdown(1), countdown(3)]))
        [[1], [0, 2]]
    """
    waiting: dict[int, Request[Any]] = {}
    results: list[tuple[int, Any]] = [(place, None) for place in range(len(texts))]
    while results:
        ended: list[int] = []
        for place, result in results:
            try:
                waiting[place] = texts[place].send(result)
            except StopIteration:
                ended.append(place)
        if ended:
            yield ended
        results = _turn(waiting)


def _turn(waiting: dict[int, Request[Any]]) -> list[tuple[int, Any]]:
    """Run the cheapest kind of request, and take it off the waiting ones: places and results, in rising order."""
    if not waiting:
        return []
    kind = min((type(request) for request in waiting.values()), key=lambda one: one.cost)
    places = sorted(place for place, request in waiting.items() if type(request) is kind)
    requests = [waiting.pop(place) for place in places]
    done = [requests[0].run()] if len(requests) == 1 else kind.run_together(requests)
    return list(zip(places, done, strict=True))
