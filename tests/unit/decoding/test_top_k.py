from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.decoding.top_k import TopKStatistics, stack_top_k, top_k_statistics

LOGITS = st.integers(2, 8).flatmap(
    lambda vocab: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=vocab, max_size=vocab), min_size=1, max_size=4
    )
)


@given(rows=LOGITS, k=st.integers(1, 10))
def test_against_plain_python(rows: list[list[float]], k: int) -> None:
    said = top_k_statistics(torch.tensor(rows), k)
    for place, row in enumerate(rows):
        top = max(row)
        log_sum_exp = top + math.log(sum(math.exp(value - top) for value in row))
        log_probs = [value - log_sum_exp for value in row]
        ranked = sorted(log_probs, reverse=True)
        assert said.log_sum_exp[place].item() == pytest.approx(log_sum_exp, abs=1e-4, rel=1e-4)
        assert said.entropy[place].item() == pytest.approx(-sum(math.exp(x) * x for x in log_probs), abs=1e-4, rel=1e-4)
        assert said.margin[place].item() == pytest.approx(ranked[0] - ranked[1], abs=1e-4, rel=1e-4)
        assert said.log_probs[place].tolist() == pytest.approx(ranked[:k], abs=1e-4, rel=1e-4)
        ids = said.ids[place].tolist()
        assert len(set(ids)) == len(ids) == min(k, len(row))
        assert said.log_probs[place].tolist() == pytest.approx([log_probs[token] for token in ids], abs=1e-4, rel=1e-4)


@given(data=st.data(), vocab=st.integers(2, 400))
def test_the_first_id_is_the_greedy_choice_even_among_equals(data: st.DataObject, vocab: int) -> None:
    """Logits in bfloat16 tie often; the verifier's token is their argmax."""
    logits = torch.zeros(1, vocab)
    logits[0, data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))] = 1.0
    for dtype in (torch.float32, torch.bfloat16):
        said = top_k_statistics(logits.to(dtype), 2)
        assert said.ids[0, 0] == logits.argmax(-1)[0]
        assert len(set(said.ids[0].tolist())) == 2


def test_ids_of_a_smaller_vocabulary() -> None:
    said = top_k_statistics(torch.tensor([[0.0, 3.0, 1.0]]), 2, torch.tensor([40, 41, 42]))
    assert said.ids.tolist() == [[41, 42]]


def test_every_leading_shape() -> None:
    logits = torch.randn(2, 3, 7)
    said = top_k_statistics(logits, 4)
    assert said.ids.shape == said.log_probs.shape == (2, 3, 4)
    assert said.entropy.shape == said.margin.shape == said.log_sum_exp.shape == (2, 3)
    torch.testing.assert_close(top_k_statistics(logits[1, 2], 4).log_probs, said.log_probs[1, 2])


def test_half_precision_is_summed_in_float32() -> None:
    said = top_k_statistics(torch.randn(3, 50).bfloat16(), 4)
    assert {said.log_probs.dtype, said.entropy.dtype, said.log_sum_exp.dtype, said.margin.dtype} == {torch.float32}


def test_an_impossible_token_adds_no_entropy() -> None:
    said = top_k_statistics(torch.tensor([[0.0, 0.0, -math.inf]]), 3)
    assert said.entropy.item() == pytest.approx(math.log(2))


def test_not_a_number_shows() -> None:
    said = top_k_statistics(torch.full((1, 4), math.nan), 2)
    assert not torch.isfinite(said.log_sum_exp).any()


def test_rows_and_stacks() -> None:
    said = top_k_statistics(torch.randn(5, 7), 3)
    stacked = stack_top_k([said[row] for row in range(5)])
    for name in ("ids", "log_probs", "log_sum_exp", "entropy", "margin"):
        assert torch.equal(getattr(stacked, name), getattr(said, name))
    part: TopKStatistics = said[1:3]
    assert torch.equal(part.ids, said.ids[1:3])
    assert torch.equal(said[torch.tensor([4, 0])].margin, said.margin[[4, 0]])
