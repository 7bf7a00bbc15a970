"""What every drafter does, seen from the decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from viasd_calib.passes.requests import Passes, Read, at_once
from viasd_calib.slim.argmax import argmax
from viasd_calib.slim.cache import CacheRow, SharedCache, keep_rows
from viasd_calib.slim.forward import RoutedModel

StopRule = Callable[[Tensor, int], Tensor | bool]
"""Told the logits of the token just drafted ([draft vocabulary]) and its place in the block, from 0;
true where drafting should stop after it, as a bool or as a flag on the device ([1], bool)."""


def never_stop(_logits: Tensor, _place: int) -> bool:
    """The stop rule that always goes on."""
    return False


class Pick(ABC):
    """Chooses a drafted token from the draft model's logits."""

    @abstractmethod
    def __call__(self, logits: Tensor, drafted: Sequence[Tensor], vocabulary: Tensor | None) -> Tensor:
        """A verifier id ([1], long).

        Args:
            logits: [draft vocabulary].
            drafted: the block's tokens so far, [1] each.
            vocabulary: verifier ids of the logits' columns, [draft vocabulary]; None where they are the verifier's.
        """

    @abstractmethod
    def proposal_probs(self, tokens: Tensor) -> Tensor | None:
        """What the block's tokens ([k]) were drawn from, [k, vocabulary]; None where nothing is drawn."""


@dataclass(frozen=True)
class GreedyPick(Pick):
    """Takes the most likely token.

    Example:
        >>> GreedyPick()(torch.tensor([0.0, 1.0]), [], torch.tensor([7, 9])).tolist()
        [9]
    """

    def __call__(self, logits: Tensor, drafted: Sequence[Tensor], vocabulary: Tensor | None) -> Tensor:
        return to_verifier_ids(argmax(logits)[None], vocabulary)

    def proposal_probs(self, tokens: Tensor) -> None:
        return None


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens, and the draft model's logits at each.

    Attributes:
        tokens: [k], long; k may be 0.
        logits: [k, draft vocabulary]; None for a drafter without a distribution.
        vocabulary: verifier ids of the logits' columns, [draft vocabulary]; None where they are the verifier's. An id
            may be in several columns.
    """

    tokens: Tensor
    logits: Tensor | None
    vocabulary: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


def first_read(prompt_length: int, prompt_window: int | None) -> int:
    """The first place of a text that a draft model reads: all of the text, or the end of its prompt and what follows.

    Args:
        prompt_length: tokens of the text when drafting begins.
        prompt_window: how many of these are read, at most; None for all.

    Example:
        >>> first_read(700, 128), first_read(90, 128), first_read(700, None)
        (572, 0, 0)
    """
    return 0 if prompt_window is None else max(prompt_length - prompt_window, 0)


class TextDrafter(ABC):
    """Proposes the next tokens of one text: all that a drafter has to remember of it.

    It follows the text through ``observe`` and ``rollback``; a text is the whole id sequence, prompt included.
    """

    taps: tuple[int, ...] = ()
    """After how many of the verifier's layers ``observe`` is given its residual stream, in rising order."""

    steps: int = 0
    """Forward passes of the draft model so far."""

    @abstractmethod
    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        """Draft at most ``limit`` tokens that go on from ``text`` ([length], long).

        A drafter that runs no model returns :func:`~viasd_calib.passes.requests.at_once` of its proposal; one that does
        is a generator that yields its forwards.
        """

    def observe(self, start: int, tapped: Tensor) -> None:  # noqa: B027 - most drafters do not read it
        """Take a verifier's residual stream at the taps ([width, taps, hidden]) for positions from ``start`` on."""

    def rollback(self, length: int) -> None:  # noqa: B027 - most drafters remember nothing
        """Forget the text from position ``length`` on."""

    @classmethod  # noqa: B027 - most texts share nothing but weights
    def keep_rows(cls, drafters: Sequence[Self]) -> None:
        """Of those that ``start_rows`` has made these alone go on: one at least, in their order."""


class Drafter(ABC):
    """What drafts: weights and settings, and nothing of any text.

    ``start`` begins a text, and what it returns follows that text alone. So any number of texts can be drafted for at
    the same time, in turns or in several threads.
    """

    vocabulary: Tensor | None = None
    """Verifier ids of the columns of ``score`` ([draft vocabulary], long); None where they are the verifier's."""

    taps: tuple[int, ...] = ()
    """After how many of the verifier's layers the drafter reads its residual stream, in rising order."""

    context: int | None = None
    """Most tokens of a text that the draft model can read, so that nothing is drafted after more; None for any."""

    networks: tuple[nn.Module, ...] = ()
    """What it runs beside the verifier's own modules, for a backend to prepare."""

    models: tuple[RoutedModel, ...] = ()
    """Those of ``networks`` that are whole models, whose passes a backend may prepare too."""

    @property
    def same_in_batches(self) -> bool:
        """Whether what it drafts for a text hangs, bit for bit, on no other text of a batch."""
        return False

    @abstractmethod
    def start(self, capacity: int) -> TextDrafter:
        """Begin a text of at most ``capacity`` tokens."""

    def start_rows(self, capacity: int, rows: int) -> Sequence[TextDrafter]:
        """Begin ``rows`` texts that are decoded together."""
        return [self.start(capacity) for _ in range(rows)]

    @abstractmethod
    def score(
        self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """What would have been drafted at every place of a text that the verifier wrote.

        Args:
            text: [length], long.
            tapped: the verifier's residual stream at the drafter's taps, [length, taps, hidden].
            depth: [length], long; how many tokens before it were drafted, not verified, when the
                token after this place is drafted.
            prompt_length: leading tokens that are a prompt, of which a model may read the end alone. At places that it
                does not read nothing is proposed; no draft begins there.

        Returns:
            Tokens [length] and logits [length, draft vocabulary] for the token *after* each place;
            a token of -1 means no proposal, logits are None without a distribution.
        """

    def score_by_depth(
        self, text: Tensor, tapped: Tensor, depths: int, prompt_length: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]] | None:
        """The same after 0 to ``depths`` - 1 drafted tokens, at all places each, in fewer passes than by :meth:`score`.

        Returns:
            None where a proposal depends on where its block began, too.
        """
        return None


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may be built from, beside its entry in a spec.

    Attributes:
        folder: of the spec; what the entry names lies relative to it.
        verifier: the opened verifier.
        tokenizer: the verifier's; None where it is missing.
    """

    folder: Path
    verifier: RoutedModel
    tokenizer: PreTrainedTokenizerBase | None = None


Builder = Callable[[Any, DraftContext], Drafter]
"""Makes a drafter from its entry in a spec."""

_BUILDERS: dict[type[object], Builder] = {}


def builds(entry: type[object]) -> Callable[[Builder], Builder]:
    """Register what builds the drafters that a kind of entry in a spec describes."""

    def add(builder: Builder) -> Builder:
        _BUILDERS[entry] = builder
        return builder

    return add


def builder_of(entry: object) -> Builder:
    """What builds the drafter of an entry; :func:`~viasd_calib.draft.build.build_drafter` has loaded them all."""
    return _BUILDERS[type(entry)]


class MemorylessDrafter(Drafter):
    """A drafter whose proposal follows from the tokens of the text alone, so that there is nothing to remember."""

    @property
    def same_in_batches(self) -> bool:
        return True

    @abstractmethod
    def propose(self, text: Tensor, limit: int) -> Proposal:
        """Propose at most ``limit`` tokens that go on from ``text`` ([length], long)."""

    def start(self, capacity: int) -> TextDrafter:
        return _MemorylessTextDrafter(self)


class _MemorylessTextDrafter(TextDrafter):
    """Asks a memoryless drafter anew each time, which counts as a step."""

    def __init__(self, drafter: MemorylessDrafter) -> None:
        self._drafter = drafter

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        self.steps += 1
        return at_once(self._drafter.propose(text, limit))


class CachedTextDrafter(TextDrafter):
    """One whose model has keys and values of its own.

    Args:
        row: the text's row of the draft model's cache, empty.
    """

    def __init__(self, row: CacheRow) -> None:
        self.row = row

    @classmethod
    def keep_rows(cls, drafters: Sequence[Self]) -> None:
        keep_rows([drafter.row for drafter in drafters])

    def rollback(self, length: int) -> None:
        self.row.rollback(length)


class CachedDrafter(Drafter):
    """A drafter whose model has keys and values of its own; the texts of a batch share one cache."""

    @abstractmethod
    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        """An empty cache of the draft model for texts of at most ``capacity`` tokens."""

    @abstractmethod
    def follow(self, row: CacheRow) -> CachedTextDrafter:
        """Begin a text on an empty row of a cache."""

    def start(self, capacity: int) -> CachedTextDrafter:
        return self.follow(CacheRow(self.new_cache(capacity)))

    def start_rows(self, capacity: int, rows: int) -> Sequence[CachedTextDrafter]:
        return [self.follow(row) for row in self.new_cache(capacity, rows).rows()]


def to_verifier_ids(places: Tensor, vocabulary: Tensor | None) -> Tensor:
    """Verifier ids for places in the draft vocabulary.

    Example:
        >>> import torch
        >>> to_verifier_ids(torch.tensor([1]), torch.tensor([7, 9])).tolist()
        [9]
    """
    return places if vocabulary is None else vocabulary[places]


def draft_stepwise(
    advance: Callable[[Tensor], Passes[Tensor]],
    unseen: Tensor,
    limit: int,
    stop: StopRule,
    pick: Pick,
    vocabulary: Tensor | None,
) -> Passes[Proposal]:
    """Draft one token after the other.

    Args:
        advance: runs the draft model over tokens ([width]) and returns logits [draft vocabulary].
        unseen: the text's tokens that the draft model has not seen, [unseen].
        vocabulary: verifier ids of the logits' columns, [draft vocabulary]; None where they are the verifier's.
    """
    tokens: list[Tensor] = []
    rows: list[Tensor] = []
    while len(tokens) < limit:
        logits = yield from advance(unseen)
        unseen = pick(logits, tokens, vocabulary)  # [1]
        tokens.append(unseen)
        rows.append(logits)
        flag = stop(logits, len(tokens) - 1)
        if isinstance(flag, Tensor):
            (flag,) = yield Read(flag)
        if flag:
            break
    if not tokens:
        return Proposal(unseen[:0], None)
    return Proposal(torch.cat(tokens), torch.stack(rows), vocabulary)
