from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.strategies import token_lists
from tests.tiny import propose
from viasd_calib.draft.lookup import PromptLookup, find_continuation
from viasd_calib.traces.capture import random_depths

TEXTS = token_lists(1, 30, vocab=4)
NGRAMS = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted)


def plain_lookup(text: list[int], limit: int, max_ngram: int, min_ngram: int) -> list[int]:
    """The rule in plain Python: the longest tail first, its latest earlier place."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for place in range(len(text) - size - 1, -1, -1):
            if text[place : place + size] == text[-size:]:
                return text[place + size : place + size + limit]
    return []


@given(text=TEXTS, limit=st.integers(0, 6), ngrams=NGRAMS)
def test_finds_what_the_plain_rule_finds(text: list[int], limit: int, ngrams: list[int]) -> None:
    least, most = ngrams
    found = find_continuation(torch.tensor(text), limit, most, least).tolist()
    assert found == plain_lookup(text, limit, most, least)


@given(text=TEXTS, limit=st.integers(1, 6), ngrams=NGRAMS)
def test_what_is_found_follows_an_earlier_match(text: list[int], limit: int, ngrams: list[int]) -> None:
    least, most = ngrams
    found = find_continuation(torch.tensor(text), limit, most, least).tolist()
    assume(found)
    joined = [*text[len(text) - least :], *found]
    assert any(text[place : place + len(joined)] == joined for place in range(len(text) - least))


@given(text=TEXTS, ngrams=NGRAMS)
def test_score_is_the_first_proposal_at_every_place(text: list[int], ngrams: list[int]) -> None:
    drafter = PromptLookup(max_ngram=ngrams[1], min_ngram=ngrams[0])
    ids = torch.tensor(text)
    tokens, logits = drafter.score(ids, torch.zeros(len(text), 0, 4), torch.zeros(len(text), dtype=torch.long))
    first = [propose(drafter.start(64), ids[: place + 1], 1).tokens.tolist() for place in range(len(text))]
    assert [[] if token == -1 else [token] for token in tokens.tolist()] == first
    assert logits is None


@given(text=TEXTS, ngrams=NGRAMS, longest=st.integers(1, 4), seed=st.integers(0, 99))
def test_score_goes_on_with_the_block_that_was_looked_up(
    text: list[int], ngrams: list[int], longest: int, seed: int
) -> None:
    """Inside a block lookup is not asked anew: what it proposed at the block's begin stands there, or nothing."""
    drafter = PromptLookup(max_ngram=ngrams[1], min_ngram=ngrams[0])
    ids, depth = torch.tensor(text), random_depths(len(text), longest, seed)
    tokens, _ = drafter.score(ids, torch.zeros(len(text), 0, 4), depth)
    for place, before in enumerate(depth.tolist()):
        begin = place + 1 - before
        block = propose(drafter.start(64), ids[:begin], longest).tokens.tolist()
        there = len(block) > before and block[:before] == text[begin : place + 1]
        assert int(tokens[place]) == (block[before] if there else -1)


@pytest.mark.parametrize("text", [[3], [1, 2, 3]])
def test_nothing_repeated_is_no_proposal(text: list[int]) -> None:
    drafter = PromptLookup()
    proposal = propose(drafter.start(64), torch.tensor(text), 5)
    assert len(proposal) == 0
    assert proposal.logits is None
    assert drafter.vocabulary is None
