"""What rounds take beside their passes, from rounds of known make and price."""

from __future__ import annotations

import pytest

from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.host import HostTime, host_time
from viasd_calib.profiling.profile import TierName
from viasd_calib.profiling.recording import RecordedRound, Span

PASSES = ReplayCosts(128, 0.25, [10.0, 11.0, 12.0, 13.0], [4.0, 4.5, 5.0, 5.5])
"""What passes cost, by width."""
ROUND, STEP, SLIM = 0.5, 0.125, 0.75
"""What is to be found."""


def round_of(steps: int, slim: int | None, full: int | None, more: float = 0.0, slower: float = 1.0) -> RecordedRound:
    """A round of draft steps, a slim pass and a full pass of these widths, with output heads, and a further time.

    It takes what passes cost, and host time beside; the head is a call of its own, and part of a pass as priced.
    """
    calls: list[tuple[TierName, str, int, float]] = [("draft", "full", 1, 0.2), ("draft", "logits", 0, 0.05)] * steps
    seconds = ROUND + steps * (PASSES.draft_step + STEP) + more
    if slim is not None:
        calls += [("slim", "slim", slim, PASSES.slim[slim - 1]), ("head", "slim_logits", 0, 0.0)]
        seconds += PASSES.slim[slim - 1] + SLIM
    if full is not None:
        calls += [("full", "full", full, PASSES.full[full - 1] - 2), ("head", "logits", 0, 2.0)]
        seconds += PASSES.full[full - 1]
    spans = (Span(tier, call, 0.0, slower * took, width) for tier, call, width, took in calls)
    return RecordedRound((*spans,), slower * seconds)


PLAIN = [round_of(0, None, 1)] * 6
SPECULATIVE = [round_of(2, None, 3, more=6.0), *[round_of(2, None, 3)] * 4, round_of(3, None, 4)]
TIERS = [round_of(1, 2, None, more=6.0), round_of(1, 2, None), round_of(2, 3, 4), round_of(2, 3, None)]


def test_what_is_beside_passes_is_found() -> None:
    """The draft model's first step of a text reads the prompt, for 6 seconds; q reads both prompts in 24 each."""
    found = host_time(PASSES, [PLAIN, SPECULATIVE, TIERS], [20.0, 28.0], tokens=12.0)
    assert (found.round, found.draft_step, found.slim_pass) == pytest.approx((ROUND, STEP, SLIM))
    assert (found.prompt, found.draft_prompt) == pytest.approx((2.0, 0.5))


def test_a_round_that_other_work_has_slowed_changes_nothing() -> None:
    slowed = [*SPECULATIVE[:3], round_of(2, None, 3, more=50.0), *SPECULATIVE[4:]]
    found, quiet = (host_time(PASSES, [PLAIN, text, TIERS], [24.0], tokens=12.0) for text in (slowed, SPECULATIVE))
    assert found == quiet


def test_a_machine_that_has_become_slower_changes_nothing() -> None:
    """All that is recorded takes twice as long as when passes were timed."""
    texts = [
        [
            round_of(2, None, 3, 6.0, slower),
            *[round_of(2, None, 3, slower=slower), round_of(0, None, 1, slower=slower)] * 4,
        ]
        for slower in (1.0, 2.0)
    ]
    quiet, slow = (host_time(PASSES, [text], [24.0 * slower], 12.0) for text, slower in zip(texts, (1, 2), strict=True))
    assert (slow.round, slow.draft_step, slow.prompt, slow.draft_prompt) == pytest.approx((ROUND, STEP, 2.0, 0.5))
    assert slow == quiet


def test_nothing_is_less_than_nothing() -> None:
    """Rounds that took less than their passes were priced at: none of it is given back."""
    fast = [round_of(2, None, 3, more=-1.0)] * 4
    found = host_time(PASSES, [[round_of(0, None, 1, more=-1.0)] * 4, fast], [24.0], tokens=12.0)
    assert (found.round, found.draft_step, found.slim_pass, found.draft_prompt) == (0, 0, 0, 0)


def test_texts_of_a_single_round_say_nothing_of_the_host() -> None:
    found = host_time(PASSES, [[round_of(0, None, 1)], []], [24.0], tokens=12.0)
    assert found == HostTime(0.0, 0.0, 0.0, 2.0, 0.0)


def test_it_is_added_to_what_passes_cost() -> None:
    found = HostTime(1.0, 0.5, 2.0, 3.0, 4.0).added_to(PASSES)
    assert found == ReplayCosts(128, 0.75, PASSES.full, [6.0, 6.5, 7.0, 7.5], round=1.0, prompt=3.0, draft_prompt=4.0)
