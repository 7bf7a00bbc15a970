from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import random_gate
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.decoding.gates import Gate
from viasd_calib.spec import LogisticGate

NAMES = st.sampled_from([DRAFT_FEATURES, SLIM_FEATURES])


def random_features(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = dict.fromkeys((*DRAFT_FEATURES, *SLIM_FEATURES))
    return {name: 3 * torch.randn(count, generator=generator) for name in names}


@given(names=NAMES, seed=st.integers(0, 99), bias=st.floats(-3, 3), count=st.integers(0, 5))
def test_against_plain_python(names: tuple[str, ...], seed: int, bias: float, count: int) -> None:
    spec = random_gate(names, seed, bias)
    features = random_features(count, seed)
    scores = Gate(spec)(features)
    assert scores.dtype == torch.float32
    assert scores.shape == (count,)
    for row in range(count):
        parts = zip(spec.features, spec.mean, spec.scale, spec.weight, strict=True)
        total = bias + sum(w * (features[name][row].item() - mean) / scale for name, mean, scale, w in parts)
        assert scores[row].item() == pytest.approx(1 / (1 + math.exp(-total)), abs=1e-5)


@given(names=NAMES, seed=st.integers(0, 99))
def test_the_order_of_features_does_not_matter(names: tuple[str, ...], seed: int) -> None:
    spec = random_gate(names, seed)
    order = list(range(len(names)))
    random.Random(seed).shuffle(order)
    shuffled = LogisticGate(
        features=[spec.features[place] for place in order],
        mean=[spec.mean[place] for place in order],
        scale=[spec.scale[place] for place in order],
        weight=[spec.weight[place] for place in order],
        bias=spec.bias,
    )
    features = random_features(4, seed)
    torch.testing.assert_close(Gate(shuffled)(features), Gate(spec)(features))


def test_no_feature_looks_at_the_full_verifier() -> None:
    assert not [name for name in (*DRAFT_FEATURES, *SLIM_FEATURES) if name.startswith(("q_", "full"))]
