from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import families, token_lists
from tests.tiny import VOCAB, make_drafter, propose, tiny_model
from viasd_calib.decoding.features import TRACED_TOP_K, DraftStatistics, draft_features, slim_features
from viasd_calib.decoding.top_k import top_k_statistics
from viasd_calib.draft.base import Pick, Proposal, never_stop
from viasd_calib.draft.combined import CombinedDrafter, CombinedTextDrafter, certain_logits
from viasd_calib.draft.lookup import find_continuation
from viasd_calib.passes.requests import finish
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.head_vocab import over_vocabulary

CAPACITY = 96
FEW = 4
"""Tokens of texts in which n-grams come again."""
KINDS = ("shallow", "near")
FRESH = [3, 1, 4, 15, 9, 2, 6]
"""A text without a repetition, and one that has come back to its beginning."""
AGAIN = [3, 1, 4, 15, 9, 3, 1]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def combined(kind: str = "shallow", family: str = "llama") -> CombinedDrafter:
    drafter = make_drafter(f"lookup+{kind}", RoutedModel(tiny_model(0, family)), family=family)
    assert isinstance(drafter, CombinedDrafter)
    return drafter


def start(kind: str = "shallow", family: str = "llama") -> CombinedTextDrafter:
    return combined(kind, family).start(CAPACITY)


def states(drafter: CombinedDrafter | CombinedTextDrafter, count: int) -> Tensor:
    return torch.randn(count, len(drafter.taps), 16, generator=torch.Generator().manual_seed(count))


def whole(drafter: CombinedDrafter, logits: Tensor | None) -> Tensor:
    """The model's logits over the verifier's vocabulary."""
    assert logits is not None
    return over_vocabulary(logits, drafter.model.vocabulary, VOCAB)


def over_verifier(proposal: Proposal) -> Tensor:
    """A proposal's logits over the verifier's vocabulary; an id of several columns has the largest."""
    assert proposal.logits is not None
    columns = torch.arange(VOCAB) if proposal.vocabulary is None else proposal.vocabulary
    rows = proposal.logits.new_full((len(proposal), VOCAB), -torch.inf)
    return rows.index_reduce_(1, columns, proposal.logits, "amax")


@dataclass(frozen=True)
class Forced(Pick):
    """Drafts the tokens of a text."""

    tokens: Tensor

    def __call__(self, logits: Tensor, drafted: Sequence[Tensor], vocabulary: Tensor | None) -> Tensor:
        return self.tokens[len(drafted)][None]

    def proposal_probs(self, tokens: Tensor) -> None:
        return None


@given(text=token_lists(1, 30, vocab=FEW), limit=st.integers(1, 6))
def test_a_confident_match_drafts_as_much_as_it_may(text: list[int], limit: int) -> None:
    """After the end of the text it goes on with what it has found, as a repetition does."""
    drafter = combined()
    found = drafter.look_up(torch.tensor(text), limit).tolist()
    plain = find_continuation(torch.tensor(text), limit, 3, 2).tolist()
    assert len(found) == (limit if plain else 0)
    assert found == [plain[place % len(plain)] for place in range(len(found))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_looked_up_block_takes_no_step_and_leaves_no_doubt(kind: str) -> None:
    def stop(_logits: Tensor, _place: int) -> bool:
        raise AssertionError("the stop rule saves steps, and there are none")

    drafter = start(kind)
    proposal = propose(drafter, torch.tensor(AGAIN), 4, stop)
    assert proposal.tokens.tolist() == [4, 15, 9, 3]
    assert drafter.steps == 0
    assert proposal.logits is not None
    assert proposal.logits.shape == (4, 4)  # over the looked-up tokens, not the verifier's vocabulary
    said = top_k_statistics(proposal.logits, 2, proposal.vocabulary)
    assert said.ids[:, 0].tolist() == [4, 15, 9, 3]
    assert said.entropy.tolist() == said.log_probs[:, 0].tolist() == [0.0] * 4
    assert said.margin.isposinf().all()


@given(seed=st.integers(0, 99), length=st.integers(1, 6))
def test_gates_see_the_same_of_a_looked_up_block_in_traces_and_in_decoding(seed: int, length: int) -> None:
    """Over the looked-up tokens, of which one may come twice, and over the verifier's whole vocabulary."""
    drafter, place = combined(), torch.arange(length)
    proposal = propose(drafter.start(CAPACITY), torch.tensor([3, 1, 3, 1]), length)
    assert proposal.logits is not None
    slim_logits = 3 * torch.randn(length, VOCAB, generator=torch.Generator().manual_seed(seed))
    slim = top_k_statistics(slim_logits, 1)
    decoded, traced = (
        DraftStatistics(proposal.tokens, top_k_statistics(logits, TRACED_TOP_K, vocabulary), place)
        for logits, vocabulary in (
            (proposal.logits, proposal.vocabulary),
            (certain_logits(proposal.tokens, VOCAB), drafter.vocabulary),
        )
    )
    seen, known = (
        draft_features(said) | slim_features(torch.zeros(length), slim_logits, slim, said, place, place)
        for said in (decoded, traced)
    )
    for name in known:
        torch.testing.assert_close(seen[name], known[name], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_confident_match_it_is_the_model(kind: str) -> None:
    """One token that has stood there before is no match."""
    text = torch.tensor([*FRESH, 3])
    vocabulary = combined(kind).model.vocabulary
    drafter, alone = start(kind), combined(kind).model.start(CAPACITY)
    asked: list[tuple[int, ...]] = []

    def stop(logits: Tensor, place: int) -> bool:
        asked.append(tuple(logits.shape))
        return place == 2

    proposal, expected = propose(drafter, text, 6, stop), propose(alone, text, 3)
    width = VOCAB if vocabulary is None else len(vocabulary)
    assert asked == [(width,)] * 3
    torch.testing.assert_close(proposal.vocabulary, vocabulary)
    assert proposal.tokens.tolist() == expected.tokens.tolist()
    assert drafter.steps == alone.steps > 0
    torch.testing.assert_close(proposal.logits, expected.logits)


def test_nothing_is_asked_nothing_is_proposed() -> None:
    for text in (FRESH, AGAIN):
        proposal = propose(start(), torch.tensor(text), 0)
        assert len(proposal) == 0
        assert proposal.logits is None


def test_what_it_shares_with_the_model() -> None:
    drafter = combined("shallow")
    assert drafter.vocabulary is None  # a looked-up token may be any
    assert drafter.model.vocabulary is not None
    assert drafter.taps == drafter.model.taps != ()
    assert drafter.networks == drafter.model.networks != ()


def test_every_text_has_a_draft_state_of_its_own() -> None:
    drafter = combined("near")
    texts = [*drafter.start_rows(CAPACITY, 2), drafter.start(CAPACITY)]
    assert len({id(text.model) for text in texts}) == 3
    propose(texts[2], torch.tensor(FRESH), 3)
    assert [text.steps for text in texts] == [0, 0, 3]


ROUNDS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 6), st.booleans(), st.integers(0, FEW - 1)), min_size=1, max_size=6
)


@settings(max_examples=50)
@given(kind=st.sampled_from(KINDS), family=families(), prompt=token_lists(1, 8, vocab=FEW), rounds=ROUNDS)
def test_rounds_leave_no_trace(
    kind: str, family: str, prompt: list[int], rounds: list[tuple[int, int, bool, int]]
) -> None:
    """After rounds of either kind, verified or not, the model says what one says that saw the text at once."""
    drafter = start(kind, family)
    tapped = states(drafter, CAPACITY)
    text, observed = list(prompt), 0
    for limit, keep, verified, own in rounds:
        text = [*text, *propose(drafter, torch.tensor(text), limit).tokens.tolist()[:keep]]
        if verified:
            text = [*text, own]
            drafter.observe(observed, tapped[observed : len(text) - 1])
            observed = len(text) - 1
            drafter.rollback(observed)
    proposal = propose(drafter.model, torch.tensor(text), 5)
    fresh = start(kind, family).model
    fresh.observe(0, tapped[:observed])
    expected = propose(fresh, torch.tensor(text), 5)
    torch.testing.assert_close(proposal.logits, expected.logits, atol=1e-3, rtol=1e-3)
    assert proposal.tokens.tolist() == expected.tokens.tolist()


def block_at(kind: str, text: Tensor, begin: int, length: int, tapped: Tensor) -> tuple[Proposal, bool]:
    """The block proposed after ``begin`` verified tokens where the model drafts the text; whether it did."""
    drafter = start(kind)
    drafter.observe(0, tapped[: begin - 1])
    pick = Forced(text[begin:])
    proposal = finish(drafter.propose(text[:begin], length, never_stop, pick))
    return proposal, drafter.steps > 0


@settings(max_examples=50)
@given(
    kind=st.sampled_from(KINDS),
    text=token_lists(2, 20, vocab=FEW),
    runs=st.lists(st.integers(1, 6), min_size=20, max_size=20),
)
def test_score_says_what_each_block_would_have_proposed(kind: str, text: list[int], runs: list[int]) -> None:
    """Block by block; after a looked-up token that was wrong, the block having fallen, it is the model."""
    ids, drafter = torch.tensor([*text, 0]), combined(kind)  # a place after the last, for the picks
    depth = torch.cat([torch.arange(run) for run in runs])[: len(text)]
    tapped = states(drafter, len(text))
    tokens, logits = drafter.score(ids[:-1], tapped, depth)
    model_tokens, model_logits = drafter.model.score(ids[:-1], tapped, depth)
    for first in torch.nonzero(depth == 0)[:, 0].tolist():
        length = next((end for end in range(first + 1, len(text)) if depth[end] == 0), len(text)) - first
        proposal, modelled = block_at(kind, ids, first + 1, length, tapped)
        stands = True
        for place in range(first, first + length):
            assert proposal.logits is not None
            if modelled or stands:
                row = over_verifier(proposal)[place - first]
                token = row.argmax() if modelled else proposal.tokens[place - first]
            else:
                row, token = whole(drafter, model_logits)[place], model_tokens[place]
            torch.testing.assert_close(logits[place], row, atol=1e-3, rtol=1e-3)
            assert tokens[place] == token
            stands = stands and bool(token == ids[place + 1])
