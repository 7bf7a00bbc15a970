"""Arithmetic of speed-ups and of what is pooled over prompts."""

from __future__ import annotations

import pytest

from viasd_calib.calibration.paired import FEWEST_PROMPTS
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.evaluation.metrics import MeasuredBatch, TextResult, pool, speedup

NO_BASELINE: dict[str, list[MeasuredBatch]] = {}


def answered(tokens: int, seconds: float, *, full_passes: int = 1, rejected: int = 0, kept: int = 0) -> MeasuredBatch:
    """One prompt of which so many tokens were emitted; ``kept`` of them had been drafted."""
    counts = Counts(
        full_passes=full_passes, slim_passes=2 * full_passes, draft_steps=3 * full_passes, rejected=rejected
    )
    drafted = [place < kept for place in range(tokens)]
    tiers = [Tier.ACCEPT if one else Tier.ESCALATE for one in drafted]
    text = TextResult("a", "chat", [Generation([5] * tokens, tiers, drafted, counts)], 0, [])
    return MeasuredBatch([text], seconds)


@pytest.mark.parametrize("n_prompts", [FEWEST_PROMPTS - 1, 2 * FEWEST_PROMPTS])
def test_twice_the_tokens_per_second_is_a_speedup_of_two(n_prompts: int) -> None:
    """Tokens differ too, so that a ratio of seconds, or one the other way round, is another number."""
    own, base = [answered(30, 0.5)] * n_prompts, [answered(15, 0.5)] * n_prompts
    found, slower = speedup(own, base, seed=0), speedup(base, own, seed=0)
    assert found is not None
    assert slower is not None
    assert (found.median, slower.median) == (pytest.approx(2.0), pytest.approx(0.5))
    assert (found.bounds is None) == (n_prompts < FEWEST_PROMPTS)


def test_half_the_seconds_is_a_speedup_of_two() -> None:
    found = speedup([answered(20, 1.0)], [answered(20, 2.0)], seed=0)
    assert found is not None
    assert found.median == pytest.approx(2.0)


def test_seconds_of_all_prompts_are_pooled_before_the_ratio() -> None:
    """A mean of the prompts' own ratios, 4 and 1, would be 2.5."""
    found = speedup([answered(10, 1.0), answered(10, 3.0)], [answered(10, 4.0), answered(10, 3.0)], seed=0)
    assert found is not None
    assert found.median == pytest.approx(7 / 4)


def test_an_interval_is_of_prompts_drawn_in_pairs() -> None:
    """The prompts differ by far, the ratio of each pair does not: so neither does the interval."""
    seconds = [0.1 * 2**place for place in range(2 * FEWEST_PROMPTS)]
    found = speedup([answered(8, one) for one in seconds], [answered(8, 1.5 * one) for one in seconds], seed=0)
    assert found is not None
    assert (found.low, found.median, found.high) == (pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.5))


def test_each_baseline_is_compared_with_under_its_own_name() -> None:
    own = [answered(20, 1.0)]
    found = pool(own, {"autoregressive": [answered(20, 4.0)], "speculative": [answered(20, 2.0)]}, seed=0)
    assert found.speedup_vs_autoregressive is not None
    assert found.speedup_vs_speculative is not None
    assert found.speedup_vs_autoregressive.median == pytest.approx(4.0)
    assert found.speedup_vs_speculative.median == pytest.approx(2.0)
    alone = pool(own, NO_BASELINE, seed=0)
    assert (alone.speedup_vs_autoregressive, alone.speedup_vs_speculative) == (None, None)


def test_the_fastest_baseline_is_that_of_the_prompts_at_hand() -> None:
    """The one with the most tokens a second, whatever the order and the number of its tokens."""
    baselines = {"autoregressive": [answered(40, 4.0)], "prompt_lookup": [answered(10, 0.5)]}
    found = pool([answered(20, 0.5)], {**baselines, "speculative": [answered(20, 1.5)]}, seed=0)
    assert found.fastest_baseline == "prompt_lookup"
    assert found.speedup_vs_fastest_baseline is not None
    assert found.speedup_vs_fastest_baseline.median == pytest.approx(2.0)
    alone = pool([answered(20, 0.5)], NO_BASELINE, seed=0)
    assert (alone.fastest_baseline, alone.speedup_vs_fastest_baseline) == (None, None)


def test_passes_are_per_token_and_acceptance_is_tokens_per_pass() -> None:
    found = pool([answered(12, 2.0, full_passes=3), answered(8, 2.0, full_passes=1)], NO_BASELINE, seed=0)
    assert (found.tokens, found.tokens_per_second) == (20, 5.0)
    assert (found.full_passes_per_token, found.acceptance_length) == (4 / 20, 20 / 4)
    assert (found.slim_passes_per_token, found.draft_steps_per_token) == (8 / 20, 12 / 20)


def test_rejections_are_a_share_of_compared_drafted_tokens() -> None:
    found = pool([answered(10, 1.0, kept=6, rejected=2)], NO_BASELINE, seed=0)
    assert found.rejection_rate == 2 / 8
    assert found.tier_shares == {"accept": 0.6, "regenerate": 0.0, "escalate": 0.4}
    assert pool([answered(10, 1.0)], NO_BASELINE, seed=0).rejection_rate is None


def text(tokens: int, prompt_seconds: list[float | None]) -> TextResult:
    """A text of so many tokens a turn, each turn with the time of its prompt's own pass."""
    turns = [
        Generation([5] * tokens, [Tier.ESCALATE] * tokens, [False] * tokens, Counts(full_passes=tokens), one)
        for one in prompt_seconds
    ]
    return TextResult("a", "chat", turns, 0, [])


def test_a_batch_counts_the_tokens_of_all_its_texts() -> None:
    together = MeasuredBatch([text(8, [0.1]), text(4, [0.1, 0.1])], 2.0)
    found = pool([together], {**NO_BASELINE, "autoregressive": [MeasuredBatch([text(8, [0.1])] * 2, 4.0)]}, seed=0)
    assert (found.tokens, found.tokens_per_second, found.full_passes_per_token) == (16, 8.0, 1.0)
    assert found.speedup_vs_autoregressive is not None
    assert found.speedup_vs_autoregressive.median == pytest.approx(2.0)
    assert found.speedup_vs_autoregressive.n == 1  # batches, not texts


def test_the_prompts_of_a_batch_are_read_together() -> None:
    """The time of a turn's prompts is that of the longest, not their sum; of two turns it is both."""
    assert MeasuredBatch([text(4, [0.5, 0.25]), text(4, [0.375])], 2.0).decode_seconds == 1.25
    assert MeasuredBatch([text(4, [0.5, 0.25])], 2.0).decode_seconds == 1.25
    assert MeasuredBatch([text(4, [0.5]), text(4, [None])], 2.0).decode_seconds is None
