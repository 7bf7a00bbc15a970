"""Training losses against the full distributions they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.rounding import assert_near
from viasd_calib.training.losses import LOSSES, training_loss
from viasd_calib.training.losses.buckets import top_k_and_rest
from viasd_calib.training.losses.kl import kl_divergence
from viasd_calib.training.losses.margin import margin_cost
from viasd_calib.training.losses.restricted_cross_entropy import restricted_cross_entropy
from viasd_calib.training.losses.total_variation import total_variation

VOCABULARY = 9
SEEDS = st.integers(0, 10_000)
SIZES = st.integers(1, VOCABULARY)
SCALES = st.sampled_from([0.3, 2.0, 30.0])
each_objective = pytest.mark.parametrize("objective", LOSSES.values(), ids=LOSSES)


def two_models(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of q and logits of a model at five places."""
    q, model = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(seed)).mul(scale).unbind()
    return q.log_softmax(-1), model


@given(seed=SEEDS, k=st.integers(1, 8))
def test_tail_bucket_never_exceeds_the_true_divergence(seed: int, k: int) -> None:
    """Merging tokens into one bucket can only lower a KL divergence (data processing inequality)."""
    log_q, model = two_models(seed, 2.0)
    top = log_q.topk(k)
    whole = (log_q.exp() * (log_q - model.log_softmax(-1))).sum(-1)
    merged = kl_divergence(top.indices, top.values, model)
    assert (merged <= whole + 1e-4).all()
    assert (merged >= -1e-4).all()


def test_all_tokens_in_the_top_give_the_true_divergence() -> None:
    q, model = torch.randn(2, 4, 6).unbind()
    log_q = q.log_softmax(-1)
    top = log_q.topk(6)
    whole = (log_q.exp() * (log_q - model.log_softmax(-1))).sum(-1)
    assert torch.allclose(kl_divergence(top.indices, top.values, model), whole, atol=1e-4)


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


@each_objective
@given(seed=SEEDS, k=SIZES, scale=SCALES)
def test_an_objective_is_0_for_equal_distributions(
    objective: Callable[..., Tensor], seed: int, k: int, scale: float
) -> None:
    log_q, _ = two_models(seed, scale)
    top = log_q.topk(k)
    assert objective(top.indices, top.values, log_q + 3.0).abs().max() < 1e-4


@each_objective
@given(seed=SEEDS, k=SIZES, scale=SCALES)
def test_an_objective_is_finite_with_finite_gradients(
    objective: Callable[..., Tensor], seed: int, k: int, scale: float
) -> None:
    log_q, model = two_models(seed, scale)
    top = log_q.topk(k)
    model.requires_grad_(True)
    found = objective(top.indices, top.values, model)
    assert found.shape == (5,)
    assert (found >= -1e-4).all()
    found.sum().backward()
    assert found.isfinite().all()
    assert model.grad is not None
    assert model.grad.isfinite().all()


@each_objective
@given(seed=SEEDS, k=SIZES, scale=SCALES)
def test_the_order_of_the_top_k_changes_nothing(
    objective: Callable[..., Tensor], seed: int, k: int, scale: float
) -> None:
    log_q, model = two_models(seed, scale)
    top = log_q.topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    found = objective(top.indices[:, order], top.values[:, order], model)
    assert_near(found, objective(top.indices, top.values, model), size=10.0)  # log-probabilities on the way


@each_objective
def test_an_objective_sees_a_difference_and_its_gradient_lowers_it(objective: Callable[..., Tensor]) -> None:
    log_q, model = two_models(3, 2.0)
    top = log_q.topk(4)
    model.requires_grad_(True)
    before = objective(top.indices, top.values, model).sum()
    before.backward()
    assert before > 0.5
    assert model.grad is not None
    assert objective(top.indices, top.values, model.detach() - 0.1 * model.grad).sum() < before


@given(seed=SEEDS, k=SIZES, scale=SCALES)
def test_total_variation_is_a_share_that_merging_can_only_lower(seed: int, k: int, scale: float) -> None:
    log_q, model = two_models(seed, scale)
    top = log_q.topk(k)
    whole = (log_q.exp() - model.softmax(-1)).abs().sum(-1) / 2
    merged = total_variation(top.indices, top.values, model)
    assert (merged <= whole.clamp(max=1) + 1e-5).all()
    if k == VOCABULARY:
        assert_near(merged, whole)


@given(seed=SEEDS, k=SIZES, scale=SCALES)
def test_the_margin_cost_begins_where_a_token_is_overstated(seed: int, k: int, scale: float) -> None:
    """Against the published sum, place by place and bucket by bucket."""
    log_q, model = two_models(seed, scale)
    top = log_q.topk(k)
    q, slim = (said.double().exp() for said in top_k_and_rest(top.indices, top.values, model))
    ratio = slim / q
    found = margin_cost(top.indices, top.values, model).double()
    published = slim * (0.5 * ratio).clamp(min=1).log() + q * (0.3 * ratio).clamp(min=1).log()
    assert_near(found.float(), published.sum(-1).float(), size=10.0)  # log-probabilities on the way
    assert (found[(ratio <= 2 - 1e-4).all(-1)] == 0).all()


def test_a_slim_verifier_that_understates_only_costs_no_margin() -> None:
    """q' gives one token less, and the other less than twice of what q gives it."""
    said = torch.tensor([[0.8, 0.2]])
    slim = torch.tensor([[0.62, 0.38]]).log()
    ids = torch.tensor([[0, 1]])
    assert margin_cost(ids, said.log(), slim).item() == 0
    assert total_variation(ids, said.log(), slim).item() == pytest.approx(0.18, abs=1e-5)
    assert margin_cost(ids, said.log(), slim, alpha=0.0).item() > 0


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a training loss 'kl' already"):
        training_loss("kl")(total_variation)
