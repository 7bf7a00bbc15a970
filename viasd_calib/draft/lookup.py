"""Prompt lookup: propose what followed the same n-gram earlier in the text (Saxena 2023); no weights."""

from __future__ import annotations

from collections.abc import Callable

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


def looked_up(text: Tensor, depth: Tensor, look_up: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What lookup drafts after each place of a text, in blocks that it looks up once, at their begin.

    Args:
        text: [length], long.
        depth: drafted tokens of the block before the one after each place, [length], long.
        look_up: a text and a limit to the continuation, [0 to limit].

    Returns:
        [length], long; -1 where the block has come to its end, or has proposed a token that is not the text's.

    Example:
        >>> text = torch.tensor([5, 6, 7, 5, 6, 8])
        >>> depth = torch.tensor([0, 0, 0, 0, 1, 2])  # after the second 5 a block is looked up: 6, 7, 5
        >>> looked_up(text, depth, lambda before, limit: find_continuation(before, limit, 3, 1)).tolist()
        [-1, -1, -1, 6, 7, -1]
    """
    tokens = torch.full_like(text, -1)
    for place, before in enumerate(depth.tolist()):
        begin = place + 1 - before
        found = look_up(text[:begin], before + 1)
        if len(found) > before and torch.equal(found[:before], text[begin : place + 1]):
            tokens[place] = found[before]
    return tokens


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

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0) -> tuple[Tensor, None]:
        """As for every drafter: nothing is proposed where the block has ended, or had proposed a wrong token before."""
        return looked_up(text, depth, lambda before, limit: self.propose(before, limit).tokens), None


@builds(PromptLookupDraft)
def build_lookup(entry: PromptLookupDraft, _context: DraftContext) -> PromptLookup:
    """The drafter of a spec's entry."""
    return PromptLookup(entry.max_ngram, entry.min_ngram)
