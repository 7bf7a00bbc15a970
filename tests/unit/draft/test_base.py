from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import RandomDrafter, propose
from viasd_calib.draft.base import Proposal, never_stop, to_verifier_ids
from viasd_calib.slim.argmax import argmax


def test_ids_of_a_smaller_vocabulary() -> None:
    places = torch.tensor([[0, 2], [1, 1]])
    assert to_verifier_ids(places, torch.tensor([5, 7, 11])).tolist() == [[5, 11], [7, 7]]
    assert to_verifier_ids(places, None) is places


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_most_probable_token_is_the_first_of_equals(data: st.DataObject, dtype: torch.dtype) -> None:
    """Logits in half precision tie often, and every place has to choose alike."""
    width = data.draw(st.integers(1, 300))
    rows = data.draw(st.lists(st.lists(st.integers(0, width - 1), max_size=4), min_size=1, max_size=3))
    logits = torch.full((len(rows), width), -1.0, dtype=dtype)
    for row, places in zip(logits, rows, strict=True):
        row[places] = 2.0
    assert argmax(logits).tolist() == [min(places, default=0) for places in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_probable_token_is_one_where_there_is_none(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0, torch.nan, 3.0], [-torch.inf] * 3], dtype=dtype)
    assert ((argmax(rows) >= 0) & (argmax(rows) < 3)).all()


def test_a_proposal_is_as_long_as_its_tokens() -> None:
    assert len(Proposal(torch.tensor([4, 5, 6]), None)) == 3
    assert len(Proposal(torch.empty(0, dtype=torch.long), None)) == 0


def test_never_stop_goes_on() -> None:
    assert never_stop(torch.zeros(3), 99) is False


def test_a_drafter_needs_neither_to_observe_nor_to_roll_back() -> None:
    drafter = RandomDrafter(8, 0).start(16)
    drafter.observe(0, torch.zeros(3, 0, 4))
    drafter.rollback(2)
    assert len(propose(drafter, torch.tensor([1]), 4)) == 4
