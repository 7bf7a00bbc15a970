"""q over whole texts: the states, keys and values that students read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import Trainer
from torch import Tensor

from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.spec import VerifierRef
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.folder import refuse_other_verifier


@torch.no_grad()
def read_text(verifier: RoutedModel, ids: Tensor, taps: Sequence[int] = ()) -> tuple[States, SharedCache]:
    """q over ``ids`` ([batch, length]): its states, and the filled cache."""
    batch, length = ids.shape
    cache = verifier.new_cache(length, batch=batch)
    return verifier.full(ids, CacheWindow(cache, 0, length, length), taps), cache


@torch.no_grad()
def read_residuals(verifier: RoutedModel, ids: Tensor, numbers: Sequence[int]) -> Tensor:
    """q's residual stream before some of its sublayers, and at its end: [batch, length, numbers, hidden].

    Args:
        ids: [batch, length].
        numbers: of the sublayers, in rising order; their count stands for the end.
    """
    batch, length = ids.shape
    window = CacheWindow(verifier.new_cache(length, batch=batch), 0, length, length)
    hidden = verifier.embed(ids)  # [batch, length, hidden]
    inputs = verifier.attention_inputs(hidden, window.positions(), window.mask, window)
    read: list[Tensor] = []
    for number, sublayer in enumerate(verifier.full_sublayers):
        if number in numbers:
            read.append(hidden)
        hidden = hidden + verifier.step(sublayer, hidden, inputs)
    if len(verifier.full_sublayers) in numbers:
        read.append(hidden)
    return torch.stack(read, 2)


def refuse_foreign_traces(trainer: Trainer, verifier: VerifierRef) -> None:
    """Refuse to learn for ``verifier`` from the texts of another one.

    Raises:
        TraceError: the trainer's traces are of another verifier, or of other weights.
    """
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, TraceDataModule):
        refuse_other_verifier(data.verifier_ref(), verifier)


class TappedStates:
    """q's residual stream at the taps of every text, computed once and kept in bfloat16 on the host.

    A token takes taps x hidden x 2 bytes: 3.4 kB for three taps of SmolLM2-135M.
    """

    def __init__(self, verifier: RoutedModel, taps: Sequence[int]) -> None:
        self._verifier = verifier
        self._taps = tuple(taps)
        self._kept: dict[int, Tensor] = {}

    def of(self, indices: list[int], ids: Tensor) -> Tensor:
        """States of a batch: [batch, length, taps, hidden]; rows are as long as ``ids``."""
        if any(index not in self._kept for index in indices):
            states, _ = read_text(self._verifier, ids, self._taps)
            for index, row in zip(indices, states.tapped, strict=True):
                self._kept[index] = row.to(torch.bfloat16).cpu()
        rows = [self._kept[index] for index in indices]
        return torch.stack([_fit(row, ids.shape[1]) for row in rows]).to(self._verifier.dtype).to(ids.device)


class KnownCaches:
    """q's caches of texts, computed once and kept on the host, as far as memory is allowed.

    A token takes 2 x layers x key/value heads x head width numbers, and the stream's width for each bridge with a
    carry: 48 kB for SmolLM2-135M in float32, 63 kB for Qwen2.5-1.5B. Where texts are mostly prompt, reading them is
    most of a training step.

    Args:
        limit: bytes; texts beyond it are read anew each time.
    """

    def __init__(self, verifier: RoutedModel, limit: float) -> None:
        self._verifier = verifier
        self._left = limit
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def of(self, indices: Sequence[int], ids: Tensor) -> SharedCache:
        """q's cache over a batch of texts ([batch, length]), by their places in the data set."""
        if any(index not in self._kept for index in indices):
            _, cache = read_text(self._verifier, ids)
            for row, index in enumerate(indices):
                self._keep(index, cache.only(row))
            return cache
        batch, length = ids.shape
        cache = self._verifier.new_cache(length, batch=batch)
        for row, index in enumerate(indices):
            for kept, slots in zip(self._kept[index], _parts(cache), strict=True):
                read = kept[..., :length, :]  # the texts of another batch may have been longer: slots nobody reads
                slots[:, row, ..., : read.shape[-2], :] = read.to(slots.device)
        return cache

    def _keep(self, index: int, cache: SharedCache) -> None:
        size = sum(part.nbytes for part in _parts(cache))
        if index in self._kept or size > self._left:
            return
        self._left -= size
        self._kept[index] = tuple(part[:, 0].cpu().clone() for part in _parts(cache))


def _parts(cache: SharedCache) -> tuple[Tensor, ...]:
    """What a cache holds: [layers or shifts, batch, ..., capacity, width] each."""
    return cache.keys, cache.values, cache.shift_states


def _fit(row: Tensor, length: int) -> Tensor:
    """Cut or pad a row of states ([any, taps, hidden]) to ``length``; what is padded is never read."""
    return torch.nn.functional.pad(row, (0, 0, 0, 0, 0, max(length - row.shape[0], 0)))[:length]
