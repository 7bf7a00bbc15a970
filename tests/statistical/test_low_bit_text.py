"""A sampled text has q's probability where q' is q's own layers in 4 bits, on q's cache: a model, not a table.

The model is a random one over a vocabulary of five, so that all 125 continuations of three tokens have probabilities
that few passes of q give. Texts are drawn in batches; q' and a draft model that is another random model decide some
tokens of each, which the audit keeps or draws anew.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.tiny import random_gate, tiny_model
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.drafting import draft_limit
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.multi_level import MultiLevel
from viasd_calib.decoding.strategies.self_speculative import SelfSpeculative
from viasd_calib.decoding.strategies.slim_only import SlimOnly
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.passes.requests import Passes
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, LowBitWeights, PolicyDrafter, Route

VOCAB = 5
LENGTH = 3
TEXTS = 3_000
BATCH = 250
PROMPT = [1, 2, 3, 1]
LAYERS = 2

FALSE_ALARM = 1e-5
"""For each of the five tests; seeds are fixed, so that a run that has passed passes again."""


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
    found = np.ones(1)
    for length in range(LENGTH):
        texts = [[*PROMPT, *text] for text in itertools.product(range(VOCAB), repeat=length)]
        follow = model.model(torch.tensor(texts)).logits[:, -1].double().softmax(-1)  # [texts, vocabulary]
        found = (found[:, None] * follow.numpy()).ravel()
    return found


@dataclass
class Watched(ThreeTier):
    """Notes what rounds meet.

    Attributes:
        full: rounds that begin with as many pending tokens as may be, and tokens to write.
    """

    full: int = 0

    def round(self, session: Session) -> Passes[None]:
        width = draft_limit(session, self.draft_length) + 1
        self.full += not session.closed and session.pending > 0 and session.pending + width > self.max_pending
        yield from super().round(session)


def three_tier(
    max_pending: int = 4, draft_length: int = 2, drafter: PolicyDrafter | None = None, regenerate_at: float = 0.5
) -> Watched:
    gates = Gates(
        draft=random_gate(DRAFT_FEATURES, 5), slim=random_gate(SLIM_FEATURES, 6),
        accept_at=0.5, regenerate_at=regenerate_at, draft_accept_at=0.6, draft_stop_below=0.2,
    )  # fmt: skip
    return Watched.from_spec(gates, Decoding(draft_length=draft_length, max_pending=max_pending, drafter=drafter))


def p_value_of(strategy: Strategy) -> tuple[float, set[Tier]]:
    """Chi-square goodness of fit of sampled texts, rare ones in one cell, and the tiers that decided."""
    model = sharpened(0)
    drafter = CausalDrafter(RoutedModel(tiny_model(1, layers=1, vocab=VOCAB)), VOCAB)
    decoder = Decoder(model, drafter, strategy, sampling=Sampling(temperature=1.0, seed=7))
    generations = decoder.generate_batch([PROMPT] * TEXTS, LENGTH, batch_size=BATCH)
    numbers = [int("".join(map(str, generation.tokens)), VOCAB) for generation in generations]
    counts = np.bincount(numbers, minlength=VOCAB**LENGTH)
    expected = chances_of(model) * TEXTS
    kept = expected >= 5
    seen = np.append(counts[kept], counts[~kept].sum())
    wanted = np.append(expected[kept], expected[~kept].sum())
    found = chisquare(seen[wanted > 0], wanted[wanted > 0] * seen.sum() / wanted.sum())
    return float(found.pvalue), {tier for generation in generations for tier in generation.tiers}


@pytest.mark.parametrize(
    "strategy",
    [SelfSpeculative(draft_length=2), MultiLevel(draft_length=2, max_pending=4)],
    ids=["self_speculative", "multi_level"],
)
def test_a_strict_text_has_qs_distribution(strategy: Strategy) -> None:
    assert p_value_of(strategy)[0] > FALSE_ALARM


@pytest.mark.parametrize(
    ("strategy", "full"),
    [(three_tier(), False), (three_tier(2, 1), True)],
    ids=["room for all", "two may be pending"],
)
def test_three_tiers_have_it_where_each_decides_and_where_no_more_may_be_pending(strategy: Watched, full: bool) -> None:
    p_value, tiers = p_value_of(strategy)
    assert p_value > FALSE_ALARM
    assert tiers == {*Tier}
    assert (strategy.full > TEXTS // 20) == full


def test_a_slim_verifier_that_writes_by_itself_keeps_it() -> None:
    strategy = three_tier(1, drafter="slim", regenerate_at=0.3)  # without a draft this gate scores below 0.5
    p_value, tiers = p_value_of(strategy)
    assert p_value > FALSE_ALARM
    assert tiers == {Tier.REGENERATE, Tier.ESCALATE}
    assert strategy.full > TEXTS // 20


def test_a_slim_verifier_that_is_not_audited_bends_it() -> None:
    """The negative control: the texts of q' in 4 bits are told from those of q."""
    assert p_value_of(SlimOnly())[0] < FALSE_ALARM
