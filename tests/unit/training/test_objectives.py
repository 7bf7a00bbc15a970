"""Objectives against the full distributions they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.training.objectives import margin_cost, restricted_cross_entropy, top_k_tail_kl


@given(seed=st.integers(0, 10_000), k=st.integers(1, 8))
def test_tail_bucket_never_exceeds_the_true_divergence(seed: int, k: int) -> None:
    """Merging tokens into one bucket can only lower a KL divergence (data processing inequality)."""
    generator = torch.Generator().manual_seed(seed)
    q, model = torch.randn(2, 5, 9, generator=generator).mul(2).unbind()
    log_q = q.log_softmax(-1)
    top = log_q.topk(k)
    whole = (log_q.exp() * (log_q - model.log_softmax(-1))).sum(-1)
    merged = top_k_tail_kl(top.indices, top.values, model)
    assert (merged <= whole + 1e-4).all()
    assert (merged >= -1e-4).all()


def test_all_tokens_in_the_top_give_the_true_divergence() -> None:
    q, model = torch.randn(2, 4, 6).unbind()
    log_q = q.log_softmax(-1)
    top = log_q.topk(6)
    whole = (log_q.exp() * (log_q - model.log_softmax(-1))).sum(-1)
    assert torch.allclose(top_k_tail_kl(top.indices, top.values, model), whole, atol=1e-4)


def test_restricted_cross_entropy_of_the_choice_alone() -> None:
    logits = torch.randn(3, 5)
    places = torch.tensor([[4, 0], [2, 1], [-1, 3]])
    log_probs = torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]]).log()
    hard = restricted_cross_entropy(places, log_probs, logits, hard_share=1.0)
    expected = -logits.log_softmax(-1)
    assert hard[0].item() == pytest.approx(expected[0, 4].item())
    assert hard[2].item() == 0.0  # q's choice is outside the reduced vocabulary
    soft = restricted_cross_entropy(places, log_probs, logits, hard_share=0.0)
    assert soft[2].item() == pytest.approx(0.2 * expected[2, 3].item(), rel=1e-5)


@given(st.integers(0, 1000), st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_the_margin_cost_is_its_formula(seed: int, alpha: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, logits = torch.randn(2, 4, 9, generator=generator).mul(2).unbind()
    q_log_probs, q_ids = q.log_softmax(-1).topk(3)
    expected = torch.zeros(4)
    for place in range(4):
        slim = logits[place].softmax(-1)
        for token, log_prob in zip(q_ids[place], q_log_probs[place], strict=True):
            ratio = slim[token] / log_prob.exp()
            expected[place] += slim[token] * ((1 - alpha) * ratio).log().clamp(min=0)
            expected[place] += log_prob.exp() * (beta * ratio).log().clamp(min=0)
    assert torch.allclose(margin_cost(q_ids, q_log_probs, logits, alpha, beta), expected, atol=1e-5)
