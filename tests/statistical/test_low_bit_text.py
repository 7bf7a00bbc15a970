"""A sampled text has q's probability where q' is q's own layers in 4 bits, on q's cache: a model, not a table.

The model is a random one over a vocabulary of five, so that all 25 continuations of two tokens have probabilities that
few passes of q give. Texts are drawn in batches; q' and a draft model that is another random model decide some tokens
of each, which the audit keeps or draws anew.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.tiny import random_gate, tiny_model
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.multi_level import MultiLevel
from viasd_calib.decoding.strategies.self_speculative import SelfSpeculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, LowBitWeights, Route

VOCAB = 5
LENGTH = 2
TEXTS = 3_000
BATCH = 250
PROMPT = [1, 2, 3, 1]
LAYERS = 2

FALSE_ALARM = 1e-5
"""For each of the three tests; seeds are fixed, so that a run that has passed passes again."""


def sharpened(seed: int) -> RoutedModel:
    """A random model whose choices are far from even."""
    model = tiny_model(seed, layers=LAYERS, vocab=VOCAB)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)  # type: ignore[operator]
    every = {"4": [*range(LAYERS)]}
    low_bit = LowBitWeights.model_validate({"attention": every, "mlp": every, "head": 4, "input_bits": 8})
    return RoutedModel(model, Route(low_bit=low_bit), {"low_bit": low_bit})


@torch.no_grad()
def chances_of(model: RoutedModel) -> np.ndarray:
    """Probability of every continuation under q, [vocabulary ** length]."""
    first = model.model(torch.tensor([PROMPT])).logits[0, -1].double().softmax(-1)  # [vocabulary]
    follow = model.model(torch.tensor([[*PROMPT, one] for one in range(VOCAB)])).logits[:, -1].double().softmax(-1)
    pairs = itertools.product(range(VOCAB), repeat=LENGTH)
    return np.array([float(first[one] * follow[one, two]) for one, two in pairs])


def three_tier() -> ThreeTier:
    gates = Gates(
        draft=random_gate(DRAFT_FEATURES, 5), slim=random_gate(SLIM_FEATURES, 6),
        accept_at=0.5, regenerate_at=0.5, draft_accept_at=0.6, draft_stop_below=0.2,
    )  # fmt: skip
    return ThreeTier.from_spec(gates, Decoding(draft_length=2, max_pending=4))


@pytest.mark.parametrize(
    "strategy",
    [three_tier(), SelfSpeculative(draft_length=2), MultiLevel(draft_length=2, max_pending=4)],
    ids=["three_tier", "self_speculative", "multi_level"],
)
def test_a_strict_text_has_qs_distribution(strategy: Strategy) -> None:
    model = sharpened(0)
    drafter = CausalDrafter(RoutedModel(tiny_model(1, layers=1, vocab=VOCAB)), VOCAB)
    decoder = Decoder(model, drafter, strategy, sampling=Sampling(temperature=1.0, seed=7))
    generations = decoder.generate_batch([PROMPT] * TEXTS, LENGTH, batch_size=BATCH)
    counts = np.zeros(VOCAB**LENGTH)
    for generation in generations:
        one, two = generation.tokens
        counts[one * VOCAB + two] += 1
    chances = chances_of(model)
    expected = chances * TEXTS
    kept = expected >= 5
    seen = np.append(counts[kept], counts[~kept].sum())
    wanted = np.append(expected[kept], expected[~kept].sum())
    assert float(chisquare(seen[wanted > 0], wanted[wanted > 0] * seen.sum() / wanted.sum()).pvalue) > FALSE_ALARM
    if type(strategy) is ThreeTier:  # all three tiers have decided tokens
        tiers = {tier for generation in generations for tier in generation.tiers}
        assert tiers == {*Tier}
