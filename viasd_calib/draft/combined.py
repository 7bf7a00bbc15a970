"""Prompt lookup and a draft model together: a confident match drafts for nothing, the model drafts the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from viasd_calib.draft.base import DraftContext, Drafter, Pick, Proposal, StopRule, TextDrafter, builds
from viasd_calib.draft.build import build_drafter
from viasd_calib.draft.lookup import find_continuation, looked_up
from viasd_calib.passes.requests import Passes
from viasd_calib.slim.parts.head_vocab import over_vocabulary
from viasd_calib.spec import CombinedDraft


class CombinedDrafter(Drafter):
    """The longest confident proposal of prompt lookup and a draft model.

    Lookup is confident where a tail of at least ``min_ngram`` tokens has occurred in the text before. Its proposal is
    then as long as may be drafted: one that comes to the end of the text goes on as a repetition does, with its own
    beginning. The model could not draft a longer one, so it is not asked, and no step of it is paid for. Elsewhere
    the model drafts the whole block, and stops by its own confidence; the stop rule is not asked of a looked-up
    block, whose tokens cost nothing. Which of the two drafts follows from the text alone, before anything is drawn.

    A looked-up token comes with logits that are certain of it (0, and -inf elsewhere), in a proposal and in
    ``score`` alike, so that gates are fitted on what they will see: entropy 0, top-1 mass 1, no limit to the margin.
    A proposal has the vocabulary of whoever made it: the model's own, or the looked-up tokens. ``score`` has both in
    one tensor, so there ``vocabulary`` is None even where the model's own is smaller; its logits are -inf outside.

    Args:
        model: the draft model; it has a distribution.
        vocab_size: the verifier's vocabulary size.
        max_ngram: longest tail that is looked up; it is tried first.
        min_ngram: shortest match that is confident.

    Attributes:
        context: the model's; lookup goes on after it.
    """

    def __init__(self, model: Drafter, vocab_size: int, max_ngram: int, min_ngram: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.taps = model.taps
        self.context = model.context
        self.networks = model.networks
        self.models = model.models

    @property
    def same_in_batches(self) -> bool:
        return self.model.same_in_batches

    def start(self, capacity: int) -> CombinedTextDrafter:
        return CombinedTextDrafter(self, self.model.start(capacity))

    def start_rows(self, capacity: int, rows: int) -> Sequence[CombinedTextDrafter]:
        return [CombinedTextDrafter(self, model) for model in self.model.start_rows(capacity, rows)]

    def look_up(self, text: Tensor, limit: int) -> Tensor:
        """The confident continuation of ``text`` ([length], long): [limit], long; [0] where there is none."""
        found = find_continuation(text, limit, self.max_ngram, self.min_ngram)
        return repeat_to(found, limit) if len(found) else found

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0) -> tuple[Tensor, Tensor]:
        """As for every drafter.

        A looked-up block that has proposed a wrong token does not come to the places after it: there the
        model drafts, as if the block were its own.
        """
        tokens, logits = self.model.score(text, tapped, depth, prompt_length)
        assert logits is not None, "the model has a distribution"
        found = looked_up(text, depth, self.look_up)  # [length]
        places = torch.nonzero(found >= 0)[:, 0]
        whole = over_vocabulary(logits, self.model.vocabulary, self.vocab_size)  # [length, vocabulary]
        whole = whole.index_copy(0, places, certain_logits(found[places], self.vocab_size).to(logits))
        return torch.where(found >= 0, found, tokens), whole


class CombinedTextDrafter(TextDrafter):
    """Drafts one text by lookup, or else with the model.

    Args:
        drafter: what looks up.
        model: the draft model's own, for this text.

    Attributes:
        steps: the model's; searches are not counted.
    """

    def __init__(self, drafter: CombinedDrafter, model: TextDrafter) -> None:
        self._drafter = drafter
        self.model = model
        self.taps = model.taps

    @classmethod
    def keep_rows(cls, drafters: Sequence[Self]) -> None:
        models = [drafter.model for drafter in drafters]
        models[0].keep_rows(models)

    def observe(self, start: int, tapped: Tensor) -> None:
        self.model.observe(start, tapped)

    def rollback(self, length: int) -> None:
        self.model.rollback(length)

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        found = self._drafter.look_up(text, limit)
        if len(found):
            self.model.rollback(text.shape[0] - 1)  # as when it drafts itself: it may have drafted beyond the text
            # Over the proposed tokens alone: elsewhere there is no mass, and the verifier's vocabulary is wide.
            own = certain_logits(torch.arange(len(found), device=found.device), len(found))
            return Proposal(found, own, found)
        drafted = yield from self.model.propose(text, limit, stop, pick)
        self.steps = self.model.steps
        return drafted


@builds(CombinedDraft)
def build_combined(entry: CombinedDraft, context: DraftContext) -> CombinedDrafter:
    """The drafter of a spec's entry."""
    model = build_drafter(entry.model, context.folder, context.verifier, context.tokenizer)
    vocab_size = context.verifier.config.vocab_size
    return CombinedDrafter(model, vocab_size, entry.lookup.max_ngram, entry.lookup.min_ngram)


def repeat_to(tokens: Tensor, length: int) -> Tensor:
    """Tokens ([n], n at least 1) again and again, up to ``length``: [length].

    Example:
        >>> repeat_to(torch.tensor([4, 7]), 5).tolist()
        [4, 7, 4, 7, 4]
    """
    return tokens.repeat(-(-length // len(tokens)))[:length]


def certain_logits(tokens: Tensor, vocab_size: int) -> Tensor:
    """Logits that leave no doubt of each of ``tokens`` ([k], long): 0 at the token, -inf elsewhere, [k, vocab_size].

    Example:
        >>> certain_logits(torch.tensor([1]), 3).tolist()
        [[-inf, 0.0, -inf]]
    """
    logits = torch.full((len(tokens), vocab_size), -torch.inf, dtype=torch.float32, device=tokens.device)
    return logits.scatter(1, tokens[:, None], 0.0)
