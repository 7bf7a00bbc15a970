"""The token shift of a bridge: it also reads the residual stream after its run, one place earlier in the text.

The skipped sublayers would have read earlier places, and a map of one place alone cannot. But what they made of the
place before is known: from q where q has passed over it, from q' where it is pending. So it lies in the cache, beside
the keys and values and under the same rules, and the bridge reads it. EAGLE (Li et al. 2024,
arXiv 2401.15077) drafts from the state of the place before, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class PreviousTokenStore(Protocol):
    """Where a forward keeps the stream after bridged runs; a slot is one such run."""

    def keep(self, slot: int, stream: Tensor) -> None:
        """Keep q's own stream, [batch, width, hidden], at the places of the forward."""
        ...

    def recur(self, slot: int, local: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream that q' has there: at each place ``local`` + ``shift`` of the stream at the place before.

        Args:
            local: [batch, width, hidden].
            shift: a linear map of streams, [..., hidden] -> [..., hidden].

        Returns:
            What is kept as well, [batch, width, hidden].
        """
        ...


def linear_recurrence(
    local: Tensor, before: Tensor, shift: Callable[[Tensor], Tensor], repeats: Tensor | None = None
) -> Tensor:
    """Streams of places in a row, each of which needs the one before: [batch, width, hidden].

    Args:
        local: what each place knows of itself, [batch, width, hidden].
        before: the stream at the place before the first, [batch, hidden].
        shift: what the next place takes from a stream, a linear map.
        repeats: places that are the one before them once more, as padding is, [1 or batch, width], bool; None for none.

    Example:
        >>> local, before = torch.ones(1, 3, 1), torch.tensor([[8.0]])
        >>> linear_recurrence(local, before, lambda stream: stream / 2).flatten().tolist()
        [5.0, 3.5, 2.75]
        >>> padded = torch.tensor([[False, False, True]])
        >>> linear_recurrence(local, before, lambda stream: stream / 2, padded).flatten().tolist()
        [5.0, 3.5, 3.5]
    """
    streams: list[Tensor] = []
    for place in range(local.shape[1]):
        if streams:
            known = before
            before = streams[-1]
            if repeats is not None:
                before = torch.where(repeats[:, place, None], known, before)
        streams.append(local[:, place] + shift(before))
    return torch.stack(streams, 1)


def repeated(positions: Tensor) -> Tensor:
    """Places that have the same position as the place before them: [rows, width] -> bool, the same shape.

    Example:
        >>> repeated(torch.tensor([[4, 5, 5, 5]])).tolist()
        [[False, False, True, True]]
    """
    return torch.cat([torch.zeros_like(positions[:, :1], dtype=torch.bool), positions[:, 1:] == positions[:, :-1]], 1)
