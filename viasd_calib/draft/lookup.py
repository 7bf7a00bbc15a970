"""Prompt lookup: propose what followed the same n-gram earlier in the text (Saxena 2023); no weights."""

from __future__ import annotations

import torch
from torch import Tensor

from viasd_calib.draft.base import DraftContext, MemorylessDrafter, Proposal, builds
from viasd_calib.spec import PromptLookupDraft


def find_continuation(text: Tensor, limit: int, max_ngram: int, min_ngram: int) -> Tensor:
    """What followed the latest earlier occurrence of the text's longest matching tail.

    Args:
        text: [length], long.
        limit: tokens to return at most.

    Returns:
        [0 to limit], long.

    Example:
        >>> find_continuation(torch.tensor([5, 6, 7, 8, 5, 6]), 2, max_ngram=3, min_ngram=1).tolist()
        [7, 8]
    """
    length = text.shape[0]
    for size in range(min(max_ngram, length - 1), min_ngram - 1, -1):
        tail = text[length - size :]
        windows = text[: length - 1].unfold(0, size, 1)  # [length - size, size]
        places = torch.nonzero((windows == tail).all(-1))[:, 0]
        if len(places):
            after = int(places[-1]) + size
            return text[after : after + limit]
    return text[:0]


class PromptLookup(MemorylessDrafter):
    """N-gram drafter.

    Args:
        max_ngram: longest tail that is looked up; it is tried first.
        min_ngram: shortest tail that is looked up.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def propose(self, text: Tensor, limit: int) -> Proposal:
        return Proposal(find_continuation(text, limit, self.max_ngram, self.min_ngram), None)

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor) -> tuple[Tensor, None]:
        tokens = torch.full_like(text, -1)
        for place in range(text.shape[0]):
            found = find_continuation(text[: place + 1], 1, self.max_ngram, self.min_ngram)
            if len(found):
                tokens[place] = found[0]
        return tokens, None


@builds(PromptLookupDraft)
def build_lookup(entry: PromptLookupDraft, _context: DraftContext) -> PromptLookup:
    """The drafter of a spec's entry."""
    return PromptLookup(entry.max_ngram, entry.min_ngram)
