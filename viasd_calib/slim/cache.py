"""The one key/value cache that the full and the slim verifier share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from viasd_calib.errors import PromptError
from viasd_calib.models import context_length


class SharedCache:
    """Keys and values of every attention sublayer, in slots that are positions of the text.

    ``exact`` counts the leading positions that q has seen: their slots hold q's keys and values in
    every layer. ``provisional`` counts the positions that q or q' has seen: slots from ``exact`` up to
    it hold what q' wrote into the layers of its route, until q passes over them. Rollback sets the two
    lengths and touches no tensor.

    Args:
        config: the verifier's configuration (layers, key/value heads, head width).
        capacity: positions there is room for.
        batch: rows; each row has its own text and the lengths are then kept by the caller.

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        context = context_length(config)
        if capacity > context:
            raise PromptError(f"{capacity} positions are asked for, the verifier's context holds {context}; shorten it")
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, batch, heads, capacity, width)
        self.capacity = capacity
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, batch, heads, capacity, width]
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # the same
        self.exact = 0
        self.provisional = 0

    def mark_exact(self, length: int) -> None:
        """q has now seen the first ``length`` positions; whatever q' wrote behind them is void."""
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

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row of the batch but ``rows`` ([kept], long)."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)


@dataclass(frozen=True)
class CacheWindow:
    """Where one forward writes, and how far it reads: what an attention module sees as its cache.

    ``start`` is one position for all rows, or a position for each ([batch], long). ``extent`` is the number
    of leading slots that are read; it is known on the host, so that no forward waits for the device.
    """

    cache: SharedCache
    start: int | Tensor
    width: int
    extent: int

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write [batch, heads, width, head width] and return everything up to ``extent``."""
        all_keys, all_values = self.cache.keys[layer], self.cache.values[layer]
        if isinstance(self.start, int):
            all_keys[:, :, self.start : self.start + self.width] = keys
            all_values[:, :, self.start : self.start + self.width] = values
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]  # [batch, 1]
            slots = self.positions()  # [batch, width]
            all_keys[rows, :, slots] = keys.transpose(1, 2)
            all_values[rows, :, slots] = values.transpose(1, 2)
        return all_keys[:, :, : self.extent], all_values[:, :, : self.extent]

    def positions(self) -> Tensor:
        """Positions of the tokens that are written: [1 or batch, width]."""
        steps = torch.arange(self.width, device=self.cache.keys.device)
        if isinstance(self.start, int):
            return (steps + self.start)[None]
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
