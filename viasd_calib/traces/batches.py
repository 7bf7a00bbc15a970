"""Batches of traced texts of like length, in an order that a resumed run finds again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from viasd_calib.errors import TraceError
from viasd_calib.traces.texts import TraceBatch, TraceText, collate


class LengthBatches(Sampler[list[int]]):
    """Batches of texts of like length, at most ``max_tokens`` with padding; shuffled anew each epoch.

    It knows how far an epoch has come, so that a run that was stopped goes on with the batches that are left.

    Several processes that train together take turns: of n, process r is given batch r, r + n, r + 2n and so on of the
    one order. All are given equally many; fewer than n batches at the end of an epoch, others in each, are left out.

    Args:
        lengths: of each text, in tokens.
        max_tokens: of a batch, padding included; a longer text is a batch of its own.
        shuffle: give the batches in an order drawn from seed and epoch; otherwise by rising length.
        seed: of the order.
        processes: how many share the batches.
        rank: of this process among them.

    Raises:
        TraceError: there are fewer batches than processes.

    Example:
        >>> whole, second = (
        ...     LengthBatches([4, 2, 3, 5, 6], 6, shuffle=False, seed=0, processes=of, rank=of - 1) for of in (1, 2)
        ... )
        >>> list(whole), list(second)
        ([[1, 2], [0], [3], [4]], [[0], [4]])
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        shuffle: bool,
        seed: int,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.shuffle = shuffle
        self.seed = seed
        self.processes = processes
        self.rank = rank
        self.epoch = 0
        self._given = 0  # batches of this epoch
        self._begin = 0  # batches that the next iteration leaves out
        if len(self) == 0:
            raise TraceError(
                f"{len(self._batches())} batches cannot be shared by {processes} processes; "
                "lower max_batch_tokens, capture more prompts, or train with fewer devices"
            )

    @property
    def sampler(self) -> LengthBatches:
        """Itself: Lightning looks for ``set_epoch`` after a batch sampler, not on it."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before the first batch of every epoch, and of what is left of one."""
        if epoch != self.epoch:
            self.epoch, self._given, self._begin = epoch, 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch for this process, also where an iteration begins in its middle."""
        return len(self._batches()) // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        # A generator begins with its first batch: Lightning makes the iterator before it sets the epoch.
        begin, self._begin = self._begin, 0
        mine = self._in_order()[self.rank :: self.processes][: len(self)]
        for given, batch in enumerate(mine[begin:], start=begin + 1):
            self._given = given
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """How far the epoch has come, and in which order of which batches."""
        return {"epoch": self.epoch, "given": self._given, "order_sha256": self._order_sha256()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on after what was given.

        Raises:
            TraceError: the state is of other texts, of another limit, or of another seed.
        """
        self.epoch = state["epoch"]
        if state["order_sha256"] != self._order_sha256():
            raise TraceError(
                "the checkpoint was made in another order of batches; resume with the traces, "
                "max_batch_tokens, validation_share, seed and number of processes it was made with"
            )
        self._given = self._begin = state["given"]

    def _order_sha256(self) -> str:
        return hashlib.sha256(str((self.processes, self._in_order())).encode()).hexdigest()

    def _in_order(self) -> list[list[int]]:
        batches = self._batches()
        if not self.shuffle:
            return batches
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]

    def _batches(self) -> list[list[int]]:
        batches: list[list[int]] = []
        for place in sorted(range(len(self.lengths)), key=lambda place: (self.lengths[place], place)):
            fits = bool(batches) and (len(batches[-1]) + 1) * self.lengths[place] <= self.max_tokens
            if fits:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches


class TraceLoader:
    """Batches of texts, read in this process, whose state is how far the epoch has come.

    It is no :class:`torch.utils.data.DataLoader`: texts lie in memory, nothing is fetched ahead, so that what was given
    is what was trained on, and Lightning does not replace the batches by a distributed sampler's.

    Attributes:
        batch_sampler: the batches; Lightning looks under this name for what to tell the epoch.
    """

    def __init__(self, texts: Sequence[TraceText], batches: LengthBatches) -> None:
        self._texts = texts
        self.batch_sampler = batches

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[TraceBatch]:
        for places in self.batch_sampler:
            yield collate([self._texts[place] for place in places])

    def state_dict(self) -> dict[str, int | str]:
        """How far the epoch has come."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            TraceError: the state is of other batches.
        """
        self.batch_sampler.load_state_dict(state)
