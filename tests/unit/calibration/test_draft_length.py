"""The stopping bound is the one whose replay is fastest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from viasd_calib.calibration.candidates import TierScores
from viasd_calib.calibration.draft_length import (
    FEWEST_BLOCKS,
    GRID,
    Blocks,
    PassCosts,
    best_stop,
    seconds_per_token,
    whole_blocks,
)


def tier_scores(depth: Tensor, draft: Tensor, agrees: Tensor) -> TierScores:
    """Scores of which the slim tier's parts do not matter."""
    return TierScores(depth, draft, agrees, draft, draft, agrees)


def costs(draft_step: float, length: int, slope: float = 0.0) -> PassCosts:
    """A full pass costs 1 and ``slope`` for each further token, a slim one a fifth of it."""
    full = [1 + slope * width for width in range(length + 1)]
    return PassCosts(draft_step, full, [seconds / 5 for seconds in full])


def stop_for(scores: TierScores, length: int, spent: PassCosts, default: float = 0.99) -> float:
    """The best bound at full costs."""
    return best_stop(scores, length, spent.draft_step, spent.full, default)


def many(scores: list[float], agrees: list[bool]) -> TierScores:
    """The same block, often enough to be believed."""
    depth = torch.arange(len(scores)).repeat(FEWEST_BLOCKS)
    return tier_scores(depth, torch.tensor(scores).repeat(FEWEST_BLOCKS), torch.tensor(agrees).repeat(FEWEST_BLOCKS))


def test_whole_blocks_leave_out_the_shorter_ones() -> None:
    """Runs 0 1 | 0 1 2 | 0 1 2 3: two of them hold a block of three, in order."""
    depth = torch.tensor([0, 1, 0, 1, 2, 0, 1, 2, 3])
    blocks = whole_blocks(tier_scores(depth, depth.float() + 10, depth == 1), 3)
    assert blocks.scores.tolist() == [[10, 11, 12], [10, 11, 12]]
    assert blocks.agrees.tolist() == [[False, True, False]] * 2


def test_a_block_that_began_inside_the_prompt_is_left_out() -> None:
    """The texts begin at depths 2 and 1: what stands before them is no part of their first block."""
    depth = torch.tensor([2, 0, 1, 2, 1, 2, 0, 1, 2])
    blocks = whole_blocks(tier_scores(depth, torch.arange(9.0), depth == 1), 3)
    assert blocks.scores.tolist() == [[1, 2, 3], [6, 7, 8]]


def decoded(scores: list[float], agrees: list[bool], stop_below: float, spent: PassCosts) -> tuple[float, int]:
    """Seconds and tokens of one round, written as the decoder runs it."""
    chance, drafted = 1.0, 0
    for score in scores:
        drafted += 1
        chance *= score
        if chance < stop_below:
            break
    accepted = 0
    while accepted < drafted and agrees[accepted]:
        accepted += 1
    return drafted * spent.draft_step + spent.full[drafted], accepted + 1


@given(
    rows=st.lists(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=4, max_size=4), min_size=1),
    stop_below=st.sampled_from(GRID),
)
def test_replay_is_the_decoders_loop(rows: list[list[tuple[float, bool]]], stop_below: float) -> None:
    spent = costs(0.25, 4, slope=0.5)
    scores = torch.tensor([[score for score, _ in row] for row in rows], dtype=torch.float64)
    agrees = torch.tensor([[agree for _, agree in row] for row in rows])
    rounds = [decoded(*map(list, zip(*row, strict=True)), stop_below, spent) for row in rows]
    expected = sum(seconds for seconds, _ in rounds) / sum(tokens for _, tokens in rounds)
    assert seconds_per_token(Blocks(scores, agrees), stop_below, spent.draft_step, spent.full) == pytest.approx(
        expected
    )


def test_sure_blocks_are_drafted_whole() -> None:
    """Where every token stands and drafting is cheap, nothing is stopped."""
    stop = stop_for(many([0.9] * 5, [True] * 5), 5, costs(0.01, 5))
    assert stop <= 0.9**4


def test_dear_drafts_are_stopped_early() -> None:
    """The same blocks, where a draft step costs as much as a pass of q and the second token never stands."""
    stop = stop_for(many([0.9, 0.5, 0.5], [True, False, False]), 3, costs(1.0, 3), default=0.0)
    assert stop > 0.9 * 0.5


def test_few_blocks_keep_the_default() -> None:
    scores = tier_scores(torch.arange(3), torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert stop_for(scores, 3, costs(0.1, 3), default=0.37) == 0.37


def test_drafts_longer_than_the_traced_ones_are_scored_by_those() -> None:
    assert stop_for(many([0.9] * 2, [True] * 2), 6, costs(0.01, 6)) < 0.99


def falling() -> TierScores:
    """Blocks of four whose first token is q's choice in all, the second in three of four, and so on; scored so."""
    kept = [4, 3, 2, 1]  # of four blocks, up to each place
    agrees = torch.tensor([[block < count for count in kept] for block in range(4)]).repeat(FEWEST_BLOCKS, 1)
    scores = torch.tensor([1.0, 3 / 4, 2 / 3, 1 / 2]).repeat(len(agrees))
    return tier_scores(torch.arange(4).repeat(len(agrees)), scores, agrees.flatten())


@pytest.mark.parametrize("draft_step", [0.05, 0.1, 0.2])
def test_before_a_cheap_slim_pass_drafting_stops_earlier(draft_step: float) -> None:
    """A dear pass is worth more drafts than a cheap one; steps are short enough that neither stops at once."""
    spent = costs(draft_step, 4)
    slim, full = (best_stop(falling(), 4, draft_step, passes, default=0.5) for passes in (spent.slim, spent.full))
    assert slim > full


def test_free_drafts_are_never_stopped() -> None:
    """Tokens that may be kept cost nothing, whichever pass checks them."""
    spent = costs(0.0, 4)
    assert [best_stop(falling(), 4, 0.0, passes, default=0.5) for passes in (spent.slim, spent.full)] == [0.0, 0.0]


def test_the_same_costs_have_the_same_bound() -> None:
    """Only the ratio of a draft step to a pass matters."""
    spent = costs(0.05, 4)
    assert best_stop(falling(), 4, 0.05, spent.slim, 0.5) == best_stop(falling(), 4, 0.25, spent.full, 0.5)
