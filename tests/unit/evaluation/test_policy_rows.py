"""Predicted and decoded policies in a report's words."""

from __future__ import annotations

from collections.abc import Sequence

from tests.timings import make_timing
from viasd_calib.calibration.policy_timing import PolicyTiming, TimedPolicy
from viasd_calib.decoding.policies import Policy
from viasd_calib.evaluation.policy_rows import POLICY_HEADINGS, policy_rows, prediction_sentence

NOTHING = (Policy("none", draft_length=0), 0.008, 0.016)
ROWS = [
    (Policy(draft_length=8, stop_below=0.4), 0.004, 0.0088),
    (Policy(draft_length=4, accept_at=0.7), 0.002, 0.005),
    NOTHING,
]


def timing(rows: Sequence[tuple[Policy, float, float]] = ROWS, n_prompts: int = 8) -> PolicyTiming:
    policies = [TimedPolicy(policy=one, predicted=said, seconds_per_token=took) for one, said, took in rows]
    return make_timing(0.005, 0.0088, n_prompts=n_prompts, policies=policies)


def test_each_policy_has_a_row_and_no_drafting_has_no_deviation() -> None:
    rows = policy_rows(timing())
    assert rows == [
        ("speculative", "draft 8, stop 0.4", "4.0", "8.8", "2.00", "1.82", "+10.0 %"),
        ("three tiers", "draft 4, slim 0.7, pending 12", "2.0", "5.0", "4.00", "3.20", "+25.0 %"),
        ("no drafting", "-", "8.0", "16.0", "1.00", "1.00", "–"),
    ]
    assert {len(row) for row in rows} == {len(POLICY_HEADINGS)}


def test_without_no_drafting_there_are_times_alone() -> None:
    rows = policy_rows(timing(ROWS[:2]))
    assert [row[2:] for row in rows] == [("4.0", "8.8", "–", "–", "–"), ("2.0", "5.0", "–", "–", "–")]


def test_the_sentence_counts_close_predictions_and_names_the_largest_deviation() -> None:
    """A prediction that is off by exactly a tenth is close."""
    assert prediction_sentence(timing()) == (
        "The replay predicted the speed-up over no drafting of 1 of 2 policies within 10\xa0% of what was decoded on "
        "8 prompts; the largest deviation is +25.0 %, of three tiers (draft 4, slim 0.7, pending 12): predicted 4.00 "
        "(simulated), decoded 3.20."
    )


def test_a_prediction_that_is_too_low_can_be_the_largest_deviation() -> None:
    rows = [(Policy(draft_length=4), 0.008, 0.004), (Policy(draft_length=8), 0.004, 0.0082), NOTHING]
    assert "largest deviation is -75.0 %, of speculative (draft 4)" in prediction_sentence(timing(rows))


def test_of_too_few_prompts_it_says_that_they_show_nothing_of_others() -> None:
    words = "fewer than the 6 prompts that an interval takes: it is what they took, and shows nothing of others."
    assert words in prediction_sentence(timing(n_prompts=5))
    assert words not in prediction_sentence(timing(n_prompts=6))
    assert "decoded on 1 prompt;" in prediction_sentence(timing(n_prompts=1))


def test_where_nothing_can_be_held_against_no_drafting_it_says_so() -> None:
    for rows in (ROWS[:2], [NOTHING]):
        assert prediction_sentence(timing(rows)).startswith("No drafting, or nothing else, was timed")
