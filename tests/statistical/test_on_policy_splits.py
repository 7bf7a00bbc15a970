"""Certificates from random splits of losses that were measured on-policy: how often the bound does not hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.tiny import constant_gate, make_drafter
from viasd_calib.calibration.betting import betting_p_value
from viasd_calib.calibration.judging import judge
from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.calibration.risk import certified
from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.models import Verifier
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, LogisticGate, Route, level_of

POPULATION, DRAWN, SPLITS, CONFIDENCE, TOKENS = 240, 120, 400, 0.9, 8
THRESHOLDS = (1.01, 0.7, 0.6, 0.52)
"""Most careful first: the first trusts nothing, and is exact."""
LEVEL = level_of(CONFIDENCE, 1)
BY_MARGIN = LogisticGate(features=["slim_margin"], mean=[0.0], scale=[1.0], weight=[1.0], bias=0.0)


@pytest.fixture(scope="module")
def losses(tiny_verifier: Verifier) -> np.ndarray:
    """Token divergence of every prompt under every candidate, decoded with it: [candidates, prompts]."""
    routed = RoutedModel(tiny_verifier.model, Route(attention_skip=[1, 2], mlp_skip=[1]))
    drafter, of_prompt = make_drafter("near", routed), loss_named("token_divergence").of_prompt
    prompts = [Prompt(id=f"{n}", turns=[" ".join(f"w{digit}" for digit in f"{n:04o}")]) for n in range(POPULATION)]
    rows: list[list[float]] = []
    for threshold in THRESHOLDS:
        gates = Gates(
            draft=constant_gate("draft_margin", 0.0), slim=BY_MARGIN, draft_accept_at=1.01, accept_at=threshold,
            regenerate_at=threshold,
        )  # fmt: skip
        method = ThreeTier.from_spec(gates, Decoding(audit="off"))
        decoder = Decoder(routed, drafter, method, tiny_verifier.eos_ids)
        answered = ((prompt, list(converse(decoder, tiny_verifier, prompt, TOKENS))) for prompt in prompts)
        rows.append([of_prompt(judge(routed, prompt, turns)) for prompt, turns in answered])
    return np.array(rows)


def held(losses: np.ndarray, bound: float) -> int:
    """How many candidates are certified by losses [candidates, prompts] in the order in which they were drawn."""
    return certified([betting_p_value(row, bound) for row in losses], LEVEL)


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_a_bound_that_does_not_hold_is_seldom_certified(losses: np.ndarray, wrong: int) -> None:
    """The bound lies just below the mean of candidate ``wrong`` over all prompts: whatever certifies it is false.

    400 random splits; above the level and three standard errors by chance in 1 of 700 tests at most.
    """
    means = losses.mean(-1)
    assert means[0] == 0 < means[1] < means[2] < means[3], "careful candidates lose less"
    bound, rng = 0.99 * float(means[wrong]), np.random.default_rng(wrong)
    counts = [held(losses[:, rng.permutation(POPULATION)[:DRAWN]], bound) for _ in range(SPLITS)]
    false = np.mean([count > wrong for count in counts])
    assert false <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / SPLITS)
    assert np.mean([count >= 1 for count in counts]) > 0.9, "exact decoding is certified, so that the test is not empty"


def test_bounds_with_room_are_certified(losses: np.ndarray) -> None:
    """At two and a half times its mean the second candidate is certified in most splits: losses vary less than that."""
    bound, rng = 2.5 * float(losses[1].mean()), np.random.default_rng(9)
    counts = [held(losses[:, rng.permutation(POPULATION)[:DRAWN]], bound) for _ in range(100)]
    assert np.mean([count >= 2 for count in counts]) > 0.5
