"""Drafting that does not pay in a text is reduced; the text stays what it is."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import Case, cases, lively_case
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.rolling_acceptance import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    NOTHING,
    WHOLE,
    RollingAcceptance,
    after_catch_up,
    length_now,
    share_kept,
)
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.speculative import Speculative

LENGTH = 6


def lengths_of(chance: float, pays_at: float, rounds: int, seed: int = 0) -> list[int]:
    """What each round drafts where each token is kept with one chance, if those before it are."""
    draws, state, lengths = random.Random(seed), RollingAcceptance[float].begin(LENGTH), []
    for _ in range(rounds):
        length = int(length_now(state, LENGTH))
        kept = next((place for place in range(length) if draws.random() >= chance), length)
        state = after_catch_up(state, length, kept, int(kept < length), LENGTH, pays_at)
        lengths.append(length)
    return lengths


@pytest.mark.parametrize("seed", range(5))
def test_a_good_drafter_is_left_alone(seed: int) -> None:
    assert lengths_of(0.9, 0.1, 300, seed) == [LENGTH] * 300


@pytest.mark.parametrize("pays_at", [0.02, 0.1, 0.4])
def test_a_useless_drafter_is_soon_asked_for_next_to_nothing(pays_at: float) -> None:
    lengths = lengths_of(0.0, pays_at, 400)
    assert sum(lengths[:40]) < 110
    assert sum(lengths[80:]) <= 320 / FIRST_PAUSE
    assert sum(lengths[200:]) <= 2 * 200 / LONGEST_PAUSE


def test_where_one_token_pays_and_a_block_does_not_one_is_drafted() -> None:
    """A token is kept with a chance of 0.5: six come to a share of 0.16, one to 0.5."""
    lengths = lengths_of(0.5, 0.3, 2000)
    assert lengths.count(1) > 1300
    assert lengths.count(LENGTH) < 300


def test_drafting_returns_once_it_pays_again() -> None:
    state = RollingAcceptance[float].begin(LENGTH)
    for _ in range(60):
        length = length_now(state, LENGTH)
        state = after_catch_up(state, length, 0, min(length, 1), LENGTH, 0.2)
    assert state.level == NOTHING
    rounds = 0
    while state.level != WHOLE:
        length = length_now(state, LENGTH)
        state = after_catch_up(state, length, length, 0, LENGTH, 0.2)
        rounds += 1
    assert FIRST_PAUSE < rounds < LONGEST_PAUSE + 20


def test_a_pass_that_decides_no_drafted_token_tells_nothing_of_them() -> None:
    state = RollingAcceptance[float].begin(LENGTH)
    assert after_catch_up(state, 0, 0, 0, LENGTH, 0.9) == state


@given(acceptance=st.floats(0, 1), length=st.integers(1, 12))
def test_the_share_of_a_block_is_the_mean_of_the_chances(acceptance: float, length: int) -> None:
    wanted = sum(acceptance**place for place in range(1, length + 1)) / length
    assert share_kept(acceptance, length) == pytest.approx(wanted, abs=1e-6)


@given(seed=st.integers(0, 10**6), chances=st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_lanes_of_a_replay_follow_the_rule_of_a_single_text(seed: int, chances: list[float]) -> None:
    draws, pays_at = random.Random(seed), 0.3
    length = torch.full((len(chances),), LENGTH)
    every, single = RollingAcceptance.begin(length), [RollingAcceptance[float].begin(LENGTH) for _ in chances]
    for _ in range(60):
        drafted = [int(length_now(one, LENGTH)) for one in single]
        assert length_now(every, length).tolist() == drafted
        kept = [
            sum(draws.random() < chance for _ in range(most)) for chance, most in zip(chances, drafted, strict=True)
        ]
        refused = [int(one < most) for one, most in zip(kept, drafted, strict=True)]
        found = list(zip(drafted, kept, refused, strict=True))
        single = [after_catch_up(one, *numbers, LENGTH, pays_at) for one, numbers in zip(single, found, strict=True)]
        columns = [torch.tensor(column) for column in (drafted, kept, refused)]
        bound = torch.full((len(chances),), pays_at, dtype=torch.float64)
        every = after_catch_up(every, columns[0], columns[1], columns[2], length, bound)


def watched(case: Case, strategy: str, pays_at: float | None) -> Strategy:
    if strategy == "speculative":
        return Speculative(case.draft_length, drafting_pays_at=pays_at)
    return dataclasses.replace(case.method(), drafting_pays_at=pays_at)


@pytest.mark.parametrize("strategy", ["speculative", "three_tier"])
@given(case=cases(count=st.integers(1, 40)), pays_at=st.floats(0.05, 1))
def test_a_greedy_text_is_the_verifiers(strategy: str, case: Case, pays_at: float) -> None:
    assert case.generate(watched(case, strategy, pays_at)).tokens == case.expected


def long_text(drafter: str, strategy: str, pays_at: float | None, seed: int = 0) -> Generation:
    case = dataclasses.replace(lively_case(seed), drafter_kind=drafter, count=56, draft_length=4, eos=frozenset())
    return case.generate(watched(case, strategy, pays_at))


@pytest.mark.parametrize("strategy", ["speculative", "three_tier"])
def test_a_drafter_that_agrees_decodes_as_without_the_rule(strategy: str) -> None:
    free, ruled = (long_text("itself", strategy, pays_at) for pays_at in (None, 0.4))
    assert free == ruled
    assert free.counts.draft_steps > 20, "it drafts"


@pytest.mark.parametrize("strategy", ["speculative", "three_tier"])
def test_a_drafter_that_is_nearly_always_wrong_drafts_little(strategy: str) -> None:
    free, ruled = (long_text("random", strategy, pays_at) for pays_at in (None, 0.4))
    assert ruled.tokens == free.tokens
    assert ruled.counts.draft_steps < 0.4 * free.counts.draft_steps


@pytest.mark.parametrize("strategy", ["speculative", "three_tier"])
def test_texts_of_a_batch_are_watched_each_by_itself(strategy: str) -> None:
    """Same counts as alone, so that what one text drafts hangs on no other."""
    case = dataclasses.replace(lively_case(0), count=30, draft_length=4, eos=frozenset())
    prompts = [[5, 9, 5, 9], [3, 1, 4, 1, 5], [7, 8], [2, 2, 2, 11]]
    decoder: Decoder = case.decoder(watched(case, strategy, 0.6))
    alone = [decoder.generate(prompt, case.count) for prompt in prompts]
    together = decoder.generate_batch(prompts, case.count, batch_size=4)
    assert together == alone
    assert len({one.counts.draft_steps for one in alone}) > 1, "they differ"
    unwatched = case.decoder(watched(case, strategy, None)).generate_batch(prompts, case.count)
    assert [one.counts for one in unwatched] != [one.counts for one in alone], "the rule had something to do"
