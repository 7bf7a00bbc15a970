"""Candidates: bounds that a replay holds within the loss, most careful first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import constant_gate
from viasd_calib.calibration.candidates import TierScores, lowest_threshold, propose, replay
from viasd_calib.errors import CalibrationError


def honest_scores(seed: int, places: int = 4000) -> TierScores:
    """Scores that are right as often as they say, for draft and slim tier."""
    generator = torch.Generator().manual_seed(seed)
    draft, own = torch.rand(2, places, generator=generator).unbind()
    draft_agrees = torch.rand(places, generator=generator) < draft
    own_agrees = torch.rand(places, generator=generator) < own
    return TierScores(torch.zeros(len(draft), dtype=torch.long), draft, draft_agrees, draft, own, own_agrees)


@given(seed=st.integers(0, 1000), max_loss=st.floats(0.001, 0.3))
def test_the_bound_holds_in_the_replay(seed: int, max_loss: float) -> None:
    scores = honest_scores(seed, 500)
    assert replay(scores, lowest_threshold(scores, max_loss))[0] <= max_loss


def test_candidates_run_from_careful_to_fast() -> None:
    gate = constant_gate("draft_margin", 0.0)
    slim = constant_gate("slim_margin", 0.0)
    found = propose(gate, slim, honest_scores(0), max_loss=0.1)
    assert len(found) > 1
    assert [c.threshold for c in found] == sorted((c.threshold for c in found), reverse=True)
    assert [c.replayed_trust for c in found] == sorted(c.replayed_trust for c in found)
    assert all(c.replayed_loss <= 0.05 for c in found)


def test_replay_against_a_loop() -> None:
    scores = honest_scores(3, 300)
    bound = 0.8
    wrong = trusted = 0
    for place in range(300):
        if scores.draft[place] >= bound or scores.accept[place] >= bound:
            trusted += 1
            wrong += not scores.draft_agrees[place]
        elif scores.own[place] >= bound:
            trusted += 1
            wrong += not scores.own_agrees[place]
    assert replay(scores, bound) == pytest.approx((wrong / 300, trusted / 300))


def test_scores_of_other_places_are_refused() -> None:
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(CalibrationError, match="same places"):
        TierScores(one.long(), one, one.bool(), two, one, one.bool())
