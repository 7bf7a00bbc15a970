"""Which output tokens a reduced head keeps, and what the others cost."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import VOCAB
from viasd_calib.errors import CalibrationError
from viasd_calib.slim.parts.head_vocab import choose_tokens, share_outside
from viasd_calib.traces.texts import TraceText

TOKENS = st.integers(0, VOCAB - 1)


def trace_text(choices: list[int]) -> TraceText:
    """A text of which nothing but q's choices, and what it chose second, is known."""
    nothing = torch.zeros(0)
    q_ids = torch.tensor([[choice, (choice + 1) % VOCAB] for choice in choices])
    return TraceText(0, "", "", "", 0, nothing, 0, q_ids, nothing, nothing, nothing, None, nothing, nothing)


@given(
    counts=st.dictionaries(TOKENS, st.integers(1, 50)).map(Counter),
    size=st.integers(4, VOCAB),
    always=st.sets(TOKENS, max_size=3),
)
def test_no_token_outside_is_more_frequent_than_one_inside(counts: Counter[int], size: int, always: set[int]) -> None:
    chosen = choose_tokens(counts, size, VOCAB, always).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == size
    assert always <= set(chosen)
    inside = [counts[token] for token in chosen if token not in always]
    outside = [counts[token] for token in range(VOCAB) if token not in chosen]
    assert max(outside, default=0) <= min(inside, default=50)


def test_the_lowest_ids_fill_what_the_traces_leave() -> None:
    assert choose_tokens(Counter({20: 3}), 4, VOCAB).tolist() == [0, 1, 2, 20]


@pytest.mark.parametrize(("size", "always", "least"), [(1, [], 2), (VOCAB + 1, [], 2), (2, [3, 4, 5], 3)])
def test_a_size_that_cannot_be_is_refused(size: int, always: list[int], least: int) -> None:
    with pytest.raises(CalibrationError, match=rf"head_vocab is {size}; give {least} to {VOCAB} tokens"):
        choose_tokens(Counter(), size, VOCAB, always)


def test_the_loss_counts_first_choices_over_all_texts() -> None:
    texts = [trace_text([3, 4, 5]), trace_text([3])]
    assert share_outside(torch.tensor([3, 4]), texts) == 0.25
    assert share_outside(torch.arange(VOCAB), texts) == 0.0
    assert share_outside(torch.tensor([6, 7]), texts) == 1.0
