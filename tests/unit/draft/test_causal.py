from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.rounding import assert_near
from tests.strategies import token_lists
from tests.tiny import VOCAB, propose, tiny_model, transformers_logits, transformers_text
from viasd_calib.draft.base import CachedTextDrafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.slim.forward import RoutedModel

CAPACITY = 96


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


DRAFTER = CausalDrafter(RoutedModel(tiny_model(5, layers=2)), VOCAB)


def start() -> CachedTextDrafter:
    return DRAFTER.start(CAPACITY)


ROUNDS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(0, 30), token_lists(0, 3)),
    min_size=1,
    max_size=6,
)


@given(prompt=token_lists(1, 8), rounds=ROUNDS)
def test_proposals_go_on_greedily_whatever_was_rolled_back(
    prompt: list[int], rounds: list[tuple[int, int, int, list[int]]]
) -> None:
    """Each round drafts, forgets a part, keeps some drafted tokens, and gets others in their place."""
    drafter = start()
    text = list(prompt)
    for limit, forget, keep, other in rounds:
        proposal = propose(drafter, torch.tensor(text), limit)
        expected = transformers_text(tiny_model(5, layers=2), text, limit, ()) if limit else []
        assert proposal.tokens.tolist() == expected
        assert (proposal.logits is None) == (limit == 0)
        # All that the drafter may still rely on is the text it was shown; at times less is left to it.
        text = [*text, *expected[:keep]]
        drafter.rollback(max(len(text) - forget, 0))
        drafter.rollback(len(text))
        text = [*text, *other]


@given(text=token_lists(1, 10), limit=st.integers(1, 5))
def test_logits_are_the_models(text: list[int], limit: int) -> None:
    proposal = propose(start(), torch.tensor(text), limit)
    whole = transformers_logits(tiny_model(5, layers=2), [*text, *proposal.tokens.tolist()])
    assert proposal.logits is not None
    assert_near(proposal.logits, whole[len(text) - 1 : -1])


@given(text=token_lists(1, 10))
def test_score_is_the_first_proposal_at_every_place(text: list[int]) -> None:
    drafter, ids = start(), torch.tensor(text)
    tokens, logits = DRAFTER.score(ids, torch.zeros(len(text), 0, 16), torch.zeros(len(text), dtype=torch.long))
    assert_near(logits, transformers_logits(tiny_model(5, layers=2), text))
    for place in range(len(text)):
        assert tokens[place] == propose(drafter, ids[: place + 1], 1).tokens[0]


@given(prompt=token_lists(1, 10), answer=token_lists(1, 6), window=st.integers(1, 12))
def test_with_a_window_score_is_what_is_proposed(prompt: list[int], answer: list[int], window: int) -> None:
    """At every place of the answer, in a text that was drafted for from its prompt on."""
    drafter = CausalDrafter(RoutedModel(tiny_model(5, layers=2)), VOCAB, window)
    text = drafter.start(CAPACITY)
    ids = torch.tensor([*prompt, *answer])
    depth = torch.zeros(len(ids), dtype=torch.long)
    tokens, logits = drafter.score(ids, torch.zeros(len(ids), 0, 16), depth, len(prompt))
    unread = max(len(prompt) - window, 0)
    assert tokens[:unread].tolist() == [-1] * unread
    read = [*prompt, *answer][unread:]
    assert_near(logits[unread:], transformers_logits(tiny_model(5, layers=2), read))
    for place in range(len(prompt) - 1, len(ids)):
        assert tokens[place] == propose(text, ids[: place + 1], 1).tokens[0]
        text.rollback(place)


def test_drafting_stops_behind_the_token_the_rule_names() -> None:
    asked: list[int] = []

    def stop(logits: Tensor, place: int) -> bool:
        assert logits.shape == (VOCAB,)
        asked.append(place)
        return place == 2

    drafter = start()
    assert len(propose(drafter, torch.tensor([4, 7]), 6, stop)) == 3
    assert asked == [0, 1, 2]
    assert drafter.steps == 3


def test_steps_begin_anew_with_a_text() -> None:
    drafter, other = start(), start()
    propose(drafter, torch.tensor([4, 7]), 4)
    assert (drafter.steps, other.steps, start().steps) == (4, 0, 0)


@given(prompt=token_lists(1, 12), limit=st.integers(0, 6), context=st.integers(1, 14))
def test_no_more_is_drafted_than_the_context_can_read(prompt: list[int], limit: int, context: int) -> None:
    """The last token that is drafted need not be read; up to there the proposal is that of a longer context."""
    model = copy.copy(tiny_model(5, layers=2))
    model.config = copy.copy(model.config)
    model.config.max_position_embeddings = context
    drafter = CausalDrafter(RoutedModel(model), VOCAB)
    text = torch.tensor(prompt)
    whole = propose(start(), text, limit).tokens.tolist()
    short = drafter.start(CAPACITY)
    assert propose(short, text, limit).tokens.tolist() == whole[: max(context + 1 - len(prompt), 0)]
    short.rollback(len(prompt) - 1)
    assert propose(short, text[:1], 1).tokens.tolist() == propose(start(), text[:1], 1).tokens.tolist()


@given(text=token_lists(1, 10), context=st.integers(1, 12))
def test_score_proposes_nothing_behind_the_context(text: list[int], context: int) -> None:
    model = copy.copy(tiny_model(5, layers=2))
    model.config = copy.copy(model.config)
    model.config.max_position_embeddings = context
    drafter, ids = CausalDrafter(RoutedModel(model), VOCAB), torch.tensor(text)
    nothing, depth = torch.zeros(len(text), 0, 16), torch.zeros(len(text), dtype=torch.long)
    tokens, logits = drafter.score(ids, nothing, depth)
    assert logits.shape == (len(text), VOCAB)
    assert not logits[context:].any()
    found = [propose(drafter.start(CAPACITY), ids[: place + 1], 1).tokens.tolist() for place in range(len(text))]
    assert [[] if token == -1 else [token] for token in tokens.tolist()] == found
