"""q' over whole texts at once, reading the cache as it will at run time.

A text is cut into runs. Within a run q' reads q's exact keys and values for everything before the run,
and its own for the run's earlier places, which are the pending ones: what the decoder does between two
q passes, for every place of a text in one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from viasd_calib.slim.cache import SharedCache, readable
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.plan import Sublayer


class MixedStore:
    """Store of a student pass: q's exact keys, values and shift states, and the student's own after them.

    Args:
        teacher: q's cache over the same text.
        starts: of each place's run, [length].
        begin: the first place that is run.
    """

    def __init__(self, teacher: SharedCache, starts: Tensor, begin: int = 0) -> None:
        self._teacher = teacher
        self._starts = starts
        self._begin = begin

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """q's and the student's keys and values of ``layer``: [batch, heads, q's length and the student's, width]."""
        return (
            torch.cat([self._teacher.keys[layer], keys], 2),
            torch.cat([self._teacher.values[layer], values], 2),
        )

    def keep(self, slot: int, stream: Tensor) -> None:
        """Nothing: what a student's own sublayers give at the end of a run is read by no one."""

    def recur(self, slot: int, local: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
        """The student's stream after a bridged run: from q's where a run begins, from its own inside.

        Args:
            local: [batch, length - begin, hidden].
        """
        length = self._starts.shape[0]
        exact = torch.nn.functional.pad(self._teacher.shift_states[slot], (0, 0, 1, 0))[:, self._begin : length]
        places = torch.arange(self._begin, length, device=local.device)
        distances = places - self._starts[self._begin :].clamp(min=self._begin)  # [length - begin]
        stream = local + shift(exact)  # right where a run begins
        for distance in range(1, int(distances.max()) + 1):
            due = (distances == distance).nonzero().squeeze(1)
            stream = stream.index_copy(1, due, local[:, due] + shift(stream[:, due - 1]))
        return stream


def run_starts(length: int, max_run: int, generator: torch.Generator) -> Tensor:
    """Cut ``length`` places into runs of 1 to ``max_run``; the start of each place's run, [length], long.

    Example:
        >>> run_starts(4, 1, torch.Generator().manual_seed(0)).tolist()
        [0, 1, 2, 3]
    """
    runs = torch.randint(1, max_run + 1, (length,), generator=generator)  # [length], more than enough
    starts = runs.cumsum(0) - runs
    return starts.repeat_interleave(runs)[:length]


def mixed_mask(starts: Tensor, sliding: int | None = None, begin: int = 0) -> Tensor:
    """What each place may read of q's slots and of its own: bool [1, 1, length - begin, 2 * length - begin].

    Args:
        starts: of each place's run, [length].
        sliding: how many positions a place reads at most, its own included; None for no such bound.
        begin: the first place that is run; a run begins there at the earliest.

    Example:
        >>> mixed_mask(torch.tensor([0, 1, 1])).int()[0, 0].tolist()
        [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]]
    """
    length = starts.shape[0]
    place = torch.arange(length, device=starts.device)
    past = readable(place[None], place[begin:, None], sliding)  # [length - begin, length]
    exact = place[None] < starts[begin:, None].clamp(min=begin)  # q's slots before the run
    return torch.cat([past & exact, (past & ~exact)[:, begin:]], 1)[None, None]


def student_states(
    model: RoutedModel,
    sublayers: Sequence[Sublayer],
    ids: Tensor,
    teacher: SharedCache,
    starts: Tensor,
    gates: Tensor | None = None,
    begin: int = 0,
) -> Tensor:
    """Last hidden states of q' over ``ids``: [batch, length - begin, hidden].

    Args:
        sublayers: what q' runs, in order.
        ids: [batch, length].
        teacher: q's cache over the same ids.
        starts: of each place's run, [length].
        gates: a factor for each sublayer's update, [sublayers]; None for 1.
        begin: the first place that q' runs at; it reads q's keys and values of all before.
    """
    hidden = model.embed(ids[:, begin:])  # [batch, length - begin, hidden]
    positions = torch.arange(begin, ids.shape[1], device=ids.device)[None]
    store = MixedStore(teacher, starts, begin)
    inputs = model.attention_inputs(hidden, positions, partial(mixed_mask, starts, begin=begin), store)
    for place, sublayer in enumerate(sublayers):
        if gates is None:
            hidden = model.advance(sublayer, hidden, inputs, store)
        else:
            hidden = hidden + gates[place] * model.step(sublayer, hidden, inputs)
    return model.final_norm(hidden)
