"""The one cache that the full and the slim verifier share: keys and values, and the states of token shifts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from viasd_calib.errors import PromptError
from viasd_calib.models import context_length
from viasd_calib.slim.families import head_width
from viasd_calib.slim.token_shift import linear_recurrence, repeated


class Lengths:
    """How far a text is in a cache.

    ``exact`` counts the leading positions that q has seen: their slots hold q's keys and values in
    every layer. ``provisional`` counts the positions that q or q' has seen: slots from ``exact`` up to
    it hold what q' wrote into the layers of its route, until q passes over them. Rollback sets the two
    lengths and touches no tensor.
    """

    def __init__(self) -> None:
        self.exact = 0
        self.provisional = 0

    def mark_exact(self, length: int) -> None:
        """q has now seen the first ``length`` positions; whatever q' wrote after them is void."""
        self.exact = self.provisional = length

    def mark_provisional(self, length: int) -> None:
        """q' has now seen the first ``length`` positions.

        Raises:
            ValueError: ``length`` lies before what q has seen.
        """
        if length < self.exact:
            raise ValueError(f"{length} positions are fewer than the {self.exact} that q has seen")
        self.provisional = length

    def rollback(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        self.exact = min(self.exact, length)
        self.provisional = min(self.provisional, length)


class SharedCache(Lengths):
    """Keys and values of every attention sublayer, and the stream after bridged runs, by position of the text.

    The lengths are those of a single text; the rows of a batch have their own, see :meth:`rows`.

    Args:
        config: the verifier's configuration (layers, key/value heads, head width).
        capacity: positions it can hold.
        batch: texts, one a row.
        shifts: how many bridges read the stream at the place before (:mod:`viasd_calib.slim.token_shift`).

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, num_attention_heads=2, hidden_size=8)
        >>> cache = SharedCache(config, capacity=16)
        >>> cache.mark_exact(5)
        >>> cache.mark_provisional(9)
        >>> cache.rollback(7)
        >>> cache.exact, cache.provisional
        (5, 7)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int,
        *,
        batch: int = 1,
        shifts: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_context(config, capacity)
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, batch, heads, capacity, head_width(config))
        self.capacity = capacity
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, batch, heads, capacity, width]
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # the same
        streams = (shifts, batch, capacity, config.hidden_size)
        self.shift_states = torch.zeros(streams, dtype=dtype, device=device)  # [shifts, batch, capacity, hidden]

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return self.keys.shape[1]

    def rows(self) -> list[CacheRow]:
        """A text's view of each row."""
        return [CacheRow(self, number) for number in range(self.batch)]

    def only(self, row: int) -> SharedCache:
        """A cache of one row, which holds the very slots of ``row``."""
        if self.batch == 1:
            return self
        alone = copy.copy(self)
        alone.keys, alone.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        alone.shift_states = self.shift_states[:, row : row + 1]
        return alone

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row of the batch but ``rows`` ([kept], long)."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
        self.shift_states = self.shift_states.index_select(1, rows)


def check_context(config: PreTrainedConfig, capacity: int) -> None:
    """Refuse more positions than a model's context holds.

    Raises:
        PromptError: naming both.
    """
    context = context_length(config)
    if capacity > context:
        raise PromptError(
            f"{capacity} positions are asked for, the {config.model_type} model's context holds {context}; "
            "shorten the prompt, or ask for fewer tokens"
        )


class CacheRow(Lengths):
    """One text's row of a cache, with lengths of its own.

    Attributes:
        shared: the cache it is a row of.
        number: which row of it; it changes when others leave.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1, hidden_size=4)
        >>> first, second, third = SharedCache(config, capacity=8, batch=3).rows()
        >>> third.mark_exact(5)
        >>> keep_rows([first, third])
        >>> third.number, third.exact, third.shared.batch
        (1, 5, 2)
    """

    def __init__(self, shared: SharedCache, number: int = 0) -> None:
        super().__init__()
        self.shared = shared
        self.number = number

    def window(self, start: int, width: int) -> CacheWindow:
        """Where a forward over this row alone writes ``width`` tokens from ``start`` on."""
        return CacheWindow(self.shared.only(self.number), start, width, start + width)


def keep_rows(rows: Sequence[CacheRow]) -> None:
    """Drop every other row of the cache that ``rows``, one at least and in their order, share."""
    cache = rows[0].shared
    cache.keep_rows(to_device([row.number for row in rows], cache.keys.device))
    for number, row in enumerate(rows):
        row.number = number


def to_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers of the host on a device, without waiting for it: from pinned memory, where that matters.

    Example:
        >>> to_device([[1, 2], [3, 4]], torch.device("cpu")).tolist()
        [[1, 2], [3, 4]]
    """
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def window_of_rows(rows: Sequence[CacheRow], starts: Sequence[int], widths: Sequence[int]) -> CacheWindow:
    """Where one forward over several rows of a cache writes: ``widths[i]`` tokens of ``rows[i]`` from ``starts[i]`` on.

    The forward is as wide as the widest row; shorter ones repeat their last token (:func:`repeat_last`).
    """
    cache = rows[0].shared
    numbers = [row.number for row in rows]
    known = to_device([starts, widths, numbers], cache.keys.device)  # [3, batch]
    extent = max(start + width for start, width in zip(starts, widths, strict=True))
    alike = len(set(widths)) == 1
    every = numbers == list(range(cache.batch))
    return CacheWindow(
        cache,
        known[0],
        max(widths),
        extent,
        widths=None if alike else known[1],
        rows=None if every else known[2],
    )


def repeat_last(rows: Sequence[Tensor]) -> Tensor:
    """Rows ([width, ...] each, none empty) as one tensor, [batch, widest, ...]: shorter ones repeat their last entry.

    Example:
        >>> repeat_last([torch.tensor([4, 5, 6]), torch.tensor([7])]).tolist()
        [[4, 5, 6], [7, 7, 7]]
    """
    widest = max(row.shape[0] for row in rows)
    return torch.stack([torch.cat([row, row[-1:].expand(widest - row.shape[0], *row.shape[1:])]) for row in rows])


@dataclass(frozen=True)
class CacheWindow:
    """Where one forward writes, and how far it reads: what an attention module sees as its cache.

    ``start`` is one position for all rows, or a position for each ([batch], long). ``extent`` is the number
    of leading slots that are read; it is known on the host, so that no forward waits for the device.

    Attributes:
        widths: how many of the tokens are a row's own, [batch], long; None for all. Those after repeat the last one,
            position and all, so that nothing is written beyond a row's text and no position lies outside the context.
        rows: which rows of the cache take part, [batch], long; None for all of them.
    """

    cache: SharedCache
    start: int | Tensor
    width: int
    extent: int
    widths: Tensor | None = None
    rows: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write [batch, heads, width, head width] and return everything up to ``extent``."""
        all_keys, all_values = self.cache.keys[layer], self.cache.values[layer]
        if isinstance(self.start, int):
            all_keys[:, :, self.start : self.start + self.width] = keys
            all_values[:, :, self.start : self.start + self.width] = values
        else:
            rows, slots = self._places  # [batch, 1], [batch, width]
            all_keys[rows, :, slots] = keys.transpose(1, 2)
            all_values[rows, :, slots] = values.transpose(1, 2)
        read = all_keys[:, :, : self.extent], all_values[:, :, : self.extent]
        if self.rows is None:
            return read
        return read[0].index_select(0, self.rows), read[1].index_select(0, self.rows)

    def keep(self, slot: int, stream: Tensor) -> None:
        """Write the stream after a bridged run: [batch, width, hidden]."""
        shift_states = self.cache.shift_states[slot]  # [cache rows, capacity, hidden]
        if isinstance(self.start, int):
            shift_states[:, self.start : self.start + self.width] = stream
        else:
            shift_states[self._places] = stream

    def recur(self, slot: int, local: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream of q' after a bridged run, which is kept; see ``PreviousTokenStore.recur``."""
        repeats = None if self.widths is None else repeated(self.positions())
        stream = linear_recurrence(local, self._before(slot), shift, repeats)
        self.keep(slot, stream)
        return stream

    def _before(self, slot: int) -> Tensor:
        """The stream at the place before the first one of each row, [batch, hidden]; 0 before the text begins."""
        shift_states = self.cache.shift_states[slot]
        if isinstance(self.start, int):
            return shift_states[:, self.start - 1] if self.start else torch.zeros_like(shift_states[:, 0])
        rows, _ = self._places
        before = shift_states[rows[:, 0], (self.start - 1).clamp(min=0)]
        return torch.where(self.start[:, None] > 0, before, 0)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Rows and slots that are written, where each row has a start of its own: [batch, 1] and [batch, width]."""
        slots = self.positions()
        rows = torch.arange(slots.shape[0], device=slots.device) if self.rows is None else self.rows
        return rows[:, None], slots

    def positions(self) -> Tensor:
        """Positions of the tokens that are written: [1 or batch, width]."""
        steps = torch.arange(self.width, device=self.cache.keys.device)
        if isinstance(self.start, int):
            return (steps + self.start)[None]
        if self.widths is not None:
            steps = torch.minimum(steps, self.widths[:, None] - 1)  # [batch, width]
        return self.start[:, None] + steps

    def mask(self, sliding: int | None = None) -> Tensor | None:
        """Which slots each token may read: bool [1 or batch, 1, width, extent]; None where it is all of them.

        Args:
            sliding: how many positions a token reads at most, its own included; None for no such bound.
        """
        whole = sliding is None or self.extent <= sliding
        if isinstance(self.start, int) and self.width == 1 and self.extent == self.start + 1 and whole:
            return None
        slots = torch.arange(self.extent, device=self.cache.keys.device)
        return readable(slots, self.positions()[:, :, None], sliding)[:, None]


def readable(slots: Tensor, positions: Tensor, sliding: int | None) -> Tensor:
    """Which of ``slots`` a token at each of ``positions`` may read: bool, of the shape they broadcast to.

    Example:
        >>> readable(torch.arange(4), torch.tensor([[1], [3]]), 2).int().tolist()
        [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    past = slots <= positions
    return past if sliding is None else past & (slots > positions - sliding)
