from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from viasd_calib.decoding.features import (
    DRAFT_FEATURES,
    LEAST_MASS,
    MARGIN_CAP,
    SLIM_FEATURES,
    DraftStatistics,
    draft_features,
    slim_features,
    top_k_kl,
)
from viasd_calib.decoding.kernels import logit_statistics
from viasd_calib.decoding.top_k import top_k_statistics

VOCAB = 9
SEEDS = st.integers(0, 999)


def random_logits(count: int, seed: int, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))


def draft_statistics(logits: Tensor, vocabulary: Tensor | None = None, top: int = 16) -> DraftStatistics:
    top_k = top_k_statistics(logits, top, vocabulary)
    return DraftStatistics(top_k.ids[:, 0], top_k, 2 + torch.arange(len(logits)))


@given(seed=SEEDS, count=st.integers(1, 4))
def test_draft_features_against_plain_python(seed: int, count: int) -> None:
    logits = random_logits(count, seed)
    features = draft_features(draft_statistics(logits))
    assert tuple(features) == DRAFT_FEATURES
    for row, probs in enumerate(logits.double().softmax(-1).tolist()):
        ranked = sorted(probs, reverse=True)
        expected = {
            "draft_entropy": -sum(p * math.log(p) for p in probs),
            "draft_log_top1": math.log(ranked[0]),
            "draft_margin": math.log(ranked[0] / ranked[1]),
            "draft_depth": 2 + row,
            "draft_log_odds": math.log(ranked[0] / sum(ranked[1:])),
            "draft_certain": 0,
            "draft_certain_depth": 0,
        }
        assert {name: column[row].item() for name, column in features.items()} == pytest.approx(expected, abs=1e-3)


@given(seed=SEEDS, top=st.integers(2, VOCAB))
def test_a_drafter_that_is_certain(seed: int, top: int) -> None:
    """All is finite; its divergence from q' is what q' lacks of its token."""
    slim = random_logits(2, seed)
    tokens = torch.tensor([3, 4])
    certain = torch.full((2, VOCAB), -torch.inf).scatter(1, tokens[:, None], 0.0)
    drafted = draft_statistics(certain, top=top)
    assert drafted.tokens.tolist() == [3, 4]
    features = draft_features(drafted)
    assert features["draft_margin"].tolist() == [MARGIN_CAP, MARGIN_CAP]
    assert features["draft_entropy"].tolist() == features["draft_log_top1"].tolist() == [0, 0]
    assert features["draft_certain"].tolist() == [1, 1]
    assert features["draft_certain_depth"].tolist() == features["draft_depth"].tolist()
    assert features["draft_log_odds"].tolist() == [0, 0]
    assert drafted.top_k is not None
    kl = top_k_kl(drafted.top_k.ids, drafted.top_k.log_probs, slim, slim.logsumexp(-1))
    expected = -slim.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(kl, expected.clamp(max=MARGIN_CAP), atol=1e-3, rtol=1e-3)


def test_a_drafter_without_a_distribution() -> None:
    features = draft_features(DraftStatistics(torch.tensor([3, 4]), None, torch.tensor([0, 1])))
    assert tuple(features) == DRAFT_FEATURES
    assert {name: column.tolist() for name, column in features.items()} == {
        "draft_entropy": [0, 0],
        "draft_log_top1": [0, 0],
        "draft_margin": [MARGIN_CAP, MARGIN_CAP],
        "draft_depth": [0, 1],
        "draft_log_odds": [0, 0],
        "draft_certain": [1, 1],
        "draft_certain_depth": [0, 1],
    }


@given(seed=SEEDS, names=st.lists(st.sampled_from(DRAFT_FEATURES), unique=True))
def test_draft_features_that_nobody_asks_for_are_left_out(seed: int, names: list[str]) -> None:
    draft = draft_statistics(random_logits(2, seed))
    found, every = draft_features(draft, names), draft_features(draft)
    assert list(found) == names
    assert all(torch.equal(column, every[name]) for name, column in found.items())


@given(seed=SEEDS, count=st.integers(1, 4), drafted=st.booleans())
def test_slim_features_against_plain_python(seed: int, count: int, drafted: bool) -> None:
    slim_logits, draft_logits = random_logits(count, seed), random_logits(count, seed + 1)
    tokens = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    draft = draft_statistics(draft_logits) if drafted else None
    place, pending = torch.arange(count), 5 + torch.arange(count)
    ratio = logit_statistics(slim_logits, tokens).log_ratio
    features = slim_features(ratio, slim_logits, top_k_statistics(slim_logits, 1), draft, place, pending)
    assert tuple(features) == SLIM_FEATURES
    rows = zip(slim_logits.double().softmax(-1).tolist(), draft_logits.double().softmax(-1).tolist(), strict=True)
    for row, (slim, p) in enumerate(rows):
        ranked = sorted(slim, reverse=True)
        expected = {
            "slim_entropy": -sum(x * math.log(x) for x in slim),
            "slim_log_top1": math.log(ranked[0]),
            "slim_margin": math.log(ranked[0] / ranked[1]),
            "log_ratio": math.log(slim[int(tokens[row])] / ranked[0]),
            "has_draft": float(drafted),
            "same_choice": float(drafted and p.index(max(p)) == slim.index(max(slim))),
            "draft_kl_slim": sum(a * math.log(a / b) for a, b in zip(p, slim, strict=True)) if drafted else 0.0,
            "draft_log_top1": math.log(max(p)) if drafted else 0.0,
            "draft_entropy": -sum(x * math.log(x) for x in p) if drafted else 0.0,
            "block_place": row,
            "pending": 5 + row,
            "slim_log_margin": math.log1p(math.log(ranked[0] / ranked[1])),
            "log_log_ratio": -math.log1p(math.log(ranked[0] / slim[int(tokens[row])])),
        }
        found = {name: column[row].item() for name, column in features.items()}
        assert found == pytest.approx(expected, abs=2e-4)


def test_slim_features_of_a_draft_without_a_distribution() -> None:
    logits = random_logits(2, 0)
    slim = top_k_statistics(logits, 1)
    draft = DraftStatistics(slim.ids[:, 0], None, torch.zeros(2, dtype=torch.long))
    features = slim_features(torch.zeros(2), logits, slim, draft, torch.arange(2), torch.arange(2))
    assert features["has_draft"].tolist() == features["same_choice"].tolist() == [1, 1]
    assert features["draft_kl_slim"].tolist() == features["draft_entropy"].tolist() == [0, 0]
    assert features["log_ratio"].tolist() == [0, 0]


@given(seed=SEEDS, top=st.integers(2, VOCAB), half=st.booleans())
def test_divergence_over_the_top_and_one_bucket(seed: int, top: int, half: bool) -> None:
    """With all tokens listed it is the divergence itself; with fewer, that of the coarser distributions."""
    vocabulary = torch.tensor([8, 1, 6, 3, 0]) if half else None
    p_logits = random_logits(3, seed, 5 if half else VOCAB, scale=1.0)
    slim_logits = random_logits(3, seed + 1, scale=1.0)
    top_k = top_k_statistics(p_logits, top, vocabulary)
    found = top_k_kl(top_k.ids, top_k.log_probs, slim_logits, slim_logits.logsumexp(-1))
    for row in range(3):
        ids = top_k.ids[row].tolist()
        p = top_k.log_probs[row].double().exp().tolist()
        slim = slim_logits[row].double().softmax(-1)[ids].tolist()
        expected = sum(a * math.log(a / b) for a, b in zip(p, slim, strict=True))
        if (rest := 1 - sum(p)) > 1e-5:
            expected += rest * math.log(rest / max(1 - sum(slim), 1e-6))
        assert found[row].item() == pytest.approx(max(expected, 0), abs=1e-3)


@given(seed=SEEDS, count=st.integers(2, VOCAB - 1))
def test_divergence_from_a_slim_verifier_that_cannot_say_all(seed: int, count: int) -> None:
    """What it cannot say is one more bucket; nothing is infinite."""
    p_logits, slim_logits = random_logits(3, seed, scale=1.0), random_logits(3, seed + 1, scale=1.0)
    impossible = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[count:]
    slim_logits[:, impossible] = -torch.inf
    top_k = top_k_statistics(p_logits, VOCAB)
    found = top_k_kl(top_k.ids, top_k.log_probs, slim_logits, slim_logits.logsumexp(-1))
    for row in range(3):
        p, slim = (logits[row].double().softmax(-1).tolist() for logits in (p_logits, slim_logits))
        lost = sum(p[token] for token in impossible.tolist())
        expected = sum(a * math.log(a / b) for a, b in zip(p, slim, strict=True) if b > 0)
        expected += lost * math.log(lost / LEAST_MASS)
        assert found[row].item() == pytest.approx(min(max(expected, 0), MARGIN_CAP), abs=1e-3)


def test_a_token_that_the_slim_verifier_cannot_say_is_the_least_likely_of_all() -> None:
    logits = random_logits(2, 0)
    tokens = torch.tensor([3, 4])
    logits[:, tokens] = -torch.inf
    ratio = logit_statistics(logits, tokens).log_ratio
    features = slim_features(ratio, logits, top_k_statistics(logits, 2), None, torch.arange(2), torch.arange(2))
    assert features["log_ratio"].tolist() == [-MARGIN_CAP, -MARGIN_CAP]
    assert all(column.isfinite().all() for column in features.values())


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_features_stay_finite_and_bounded(scale: float) -> None:
    logits, other = random_logits(50, 0, scale=scale), random_logits(50, 1, scale=scale)
    draft = draft_statistics(other)
    place = torch.arange(50)
    ratio = logit_statistics(logits, torch.zeros(50, dtype=torch.long)).log_ratio
    features = slim_features(ratio, logits, top_k_statistics(logits, 1), draft, place, place) | draft_features(draft)
    assert all(torch.isfinite(column).all() for column in features.values())
    assert features["slim_margin"].max() == features["draft_kl_slim"].max() == MARGIN_CAP
    assert features["log_ratio"].min() == -MARGIN_CAP


@given(seed=SEEDS, names=st.lists(st.sampled_from(SLIM_FEATURES), unique=True))
def test_the_features_asked_for_are_those_of_all(seed: int, names: list[str]) -> None:
    logits, draft, place = random_logits(3, seed), draft_statistics(random_logits(3, seed + 1)), torch.arange(3)
    asked = (torch.zeros(3), logits, top_k_statistics(logits, 1), draft, place, place)
    every, some = slim_features(*asked), slim_features(*asked, names)
    assert list(some) == names
    assert all(torch.equal(some[name], every[name]) for name in names)
