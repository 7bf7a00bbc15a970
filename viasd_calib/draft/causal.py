"""Any causal language model with the verifier's vocabulary as the draft model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from viasd_calib.draft.base import (
    CachedDrafter,
    CachedTextDrafter,
    DraftContext,
    Pick,
    Proposal,
    StopRule,
    builds,
    draft_stepwise,
    first_read,
)
from viasd_calib.errors import DraftWarning, ModelError
from viasd_calib.models import DTYPE_NAMES, beside, context_length, first_difference, load_draft_model
from viasd_calib.passes.model_passes import ModelPass, PassResult
from viasd_calib.passes.requests import Cost, Passes
from viasd_calib.slim.cache import CacheRow, CacheWindow, SharedCache
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import CausalLMDraft


class DraftPass(ModelPass):
    """A forward of a whole model that drafts."""

    cost = Cost.DRAFT


class CausalDrafter(CachedDrafter):
    """A whole model drafts, with a cache of its own; after as many tokens as its context holds, and no more.

    Matrices of models with one tokenizer may be padded to different heights. Rows beyond the verifier's are left out,
    so that no id is proposed which the verifier does not have; where the draft model has fewer, its own are the only
    ones proposed, and an id that it does not have, which is of no token, it reads as its last one.

    Args:
        model: the draft model; its tokenizer is the verifier's.
        verifier_vocab: rows of the verifier's output.
        prompt_window: how many of a prompt's last tokens the draft model reads, at most; None for all.

    Attributes:
        columns: how many of its output's rows are proposed from.
    """

    def __init__(self, model: RoutedModel, verifier_vocab: int, prompt_window: int | None = None) -> None:
        self.prompt_window = prompt_window
        self._rows = model.config.vocab_size
        self.columns = min(self._rows, verifier_vocab)
        self._padded = self._rows < verifier_vocab
        self.vocabulary = torch.arange(self._rows, device=model.device) if self._padded else None
        self.model = model
        self.context: int = context_length(model.config)
        self.networks = (model.model,)
        self.models = (model,)

    @property
    def same_in_batches(self) -> bool:
        return self.model.same_in_batches

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        return self.model.new_cache(min(capacity, self.context), batch)

    def follow(self, row: CacheRow) -> CausalTextDrafter:
        return CausalTextDrafter(row, self)

    def own(self, ids: Tensor) -> Tensor:
        """A text's ids as the draft model reads them."""
        return ids.clamp(max=self._rows - 1) if self._padded else ids

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0) -> tuple[Tensor, Tensor]:
        """As for every drafter; after more tokens than the context holds nothing is proposed, and all logits are 0."""
        first = first_read(prompt_length, self.prompt_window)
        read = text[first : first + self.context]
        length, unread = read.shape[0], text.shape[0] - first - read.shape[0]
        window = CacheWindow(self.model.new_cache(length), 0, length, length)
        logits = self.model.logits(self.model.full(self.own(read)[None], window).last[0])  # [length, rows]
        logits = logits[:, : self.columns].contiguous()
        tokens = nn.functional.pad(logits.argmax(-1), (first, unread), value=-1)  # [text]
        return tokens, nn.functional.pad(logits, (0, 0, first, unread))

    def score_by_depth(
        self, text: Tensor, tapped: Tensor, depths: int, prompt_length: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As for every drafter: the tokens before alone matter."""
        return repeat(self.score(text, tapped, torch.zeros_like(text), prompt_length), depths)


class CausalTextDrafter(CachedTextDrafter):
    """Drafts one text with a whole model.

    Args:
        row: the text's row of the model's cache, empty.
        drafter: what drafts.

    Attributes:
        skipped: leading positions of the text that are not read, and not counted in the row; None before the prompt
            is known.
    """

    def __init__(self, row: CacheRow, drafter: CausalDrafter) -> None:
        super().__init__(row)
        self._drafter = drafter
        self.skipped: int | None = None

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        length = text.shape[0]
        if self.skipped is None:
            self.skipped = first_read(length, self._drafter.prompt_window)
        read, most = length - self.skipped, self._drafter.context
        self.row.rollback(read - 1)  # the last one is run again where nothing is new
        room = most + 1 - read  # the last token that is drafted need not be read
        unseen = text[self.skipped + self.row.exact :]
        return draft_stepwise(self._advance, unseen, min(limit, room), stop, pick, self._drafter.vocabulary)

    def observe(self, start: int, tapped: Tensor) -> None:
        """As for every drafter: it takes the length of the prompt alone, whose last token q has not read."""
        if self.skipped is None:
            self.skipped = first_read(start + tapped.shape[0] + 1, self._drafter.prompt_window)

    def rollback(self, length: int) -> None:
        super().rollback(max(length - (self.skipped or 0), 0))

    def _advance(self, ids: Tensor) -> Passes[Tensor]:
        start, drafter = self.row.exact, self._drafter
        result: PassResult = yield DraftPass(drafter.model, self.row, start, drafter.own(ids), wanted=1)
        self.row.mark_exact(start + ids.shape[0])
        self.steps += 1
        return result.logits[0, : drafter.columns]


@builds(CausalLMDraft)
def build_causal(entry: CausalLMDraft, context: DraftContext) -> CausalDrafter:
    """The drafter of a spec's entry.

    Raises:
        ModelError: the model is missing, damaged or of another tokenizer.
    """
    verifier = context.verifier
    model, own = load_draft_model(
        beside(entry.name_or_path, context.folder),
        dtype=DTYPE_NAMES[verifier.dtype],
        device=str(verifier.device),
        revision=entry.revision,
    )
    rows, verifier_rows = model.config.vocab_size, verifier.config.vocab_size
    _check_tokens(entry.name_or_path, own, context.tokenizer, rows, verifier_rows)
    return CausalDrafter(verifier.alike(model), verifier_rows, entry.prompt_window)


def _check_tokens(
    name: str,
    own: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int,
    verifier_rows: int,
) -> None:
    """Refuse a draft model of another tokenizer: what it proposes would be other tokens.

    Args:
        own: the draft model's tokenizer.
        tokenizer: the verifier's.
        rows: the draft model's output rows.
    """
    if own is not None and tokenizer is not None:
        difference = first_difference(own, tokenizer)
        if difference is not None:
            number, there, here = difference
            raise ModelError(
                f"the draft model {name} has another tokenizer than the verifier: id {number} is {there} there and "
                f"{here} here; choose a draft model with the verifier's tokenizer"
            )
        return
    lacking = f"the draft model {name} has no tokenizer" if own is None else "the verifier comes without a tokenizer"
    mend = (
        "copy the verifier's tokenizer files into its folder if it is the same"
        if own is None
        else f"give the verifier's, so that it is compared with that of the draft model {name}"
    )
    if rows != verifier_rows:
        raise ModelError(
            f"{lacking}, and {name} has {rows} output rows beside the verifier's {verifier_rows}, so that nothing says "
            f"that their tokens are the same; {mend}"
        )
    warnings.warn(
        f"{lacking}: as both have {rows} output rows, their tokens are taken to be the same; {mend}",
        DraftWarning,
        stacklevel=2,
    )
