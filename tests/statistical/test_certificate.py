"""The certificate holds as often as it says: losses that are drawn, through the real ``certify``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy.stats import binom

from tests.tiny import constant_gate
from viasd_calib.calibration import certify as certification
from viasd_calib.calibration.betting import betting_p_value
from viasd_calib.calibration.candidates import Candidate
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.errors import CalibrationError
from viasd_calib.models import Verifier, encode_prompt
from viasd_calib.prompts import Prompt, Split
from viasd_calib.spec import Gates

BOUND, CONFIDENCE, PROMPTS = 0.3, 0.9, 20
LEVEL = (1 - CONFIDENCE) / 2
"""Of the first attempt."""
HASHES: dict[Split, str] = {"fit": "a" * 64, "calibrate": "b" * 64, "test": "c" * 64}
GATES = Gates(draft=constant_gate("draft_margin", 0.0), slim=constant_gate("slim_margin", 0.0), accept_at=0.9,
              regenerate_at=0.9)  # fmt: skip


@dataclass
class Stub:
    """A decoder whose next answer is lost (token 1) or not (token 0), as given."""

    answers: Iterator[float]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
        """One token."""
        return Generation([int(next(self.answers))], [Tier.ESCALATE], [True], Counts(full_passes=1))


@pytest.fixture(autouse=True)
def judge_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that would always choose token 0; and each prompt is put into tokens once, for all runs."""
    logits = torch.tensor([[1.0, 0.0]])
    monkeypatch.setattr("viasd_calib.calibration.judging.read_answer", lambda *_: (logits, logits))
    known: dict[tuple[str, int], list[int]] = {}

    def remembered(verifier: Verifier, prompt: Prompt, answers: list[str], room: int) -> list[int]:
        key = prompt.id, len(answers)
        if key not in known:
            known[key] = encode_prompt(verifier, prompt, answers, room)
        return known[key]

    monkeypatch.setattr("viasd_calib.prompt_lengths.encode_prompt", remembered)


def distinct_prompts(count: int) -> list[Prompt]:
    """Prompts no two of which ask the same."""
    return [Prompt(id=f"{number}", turns=[" ".join(f"w{digit}" for digit in f"{number:o}")]) for number in range(count)]


def certifies(
    verifier: Verifier, losses: Sequence[Sequence[float]], prompts: Sequence[Prompt], confidence: float = CONFIDENCE
) -> int:
    """How many candidates, each with its losses in the order of decoding, the real ``certify`` lets pass."""
    candidates = [Candidate(GATES, 1 - 0.01 * number, 0.0, 0.0) for number in range(len(losses))]
    decoders = {one.threshold: Stub(iter(answers)) for one, answers in zip(candidates, losses, strict=True)}
    found = certification.certify(
        candidates, lambda one: cast(Any, decoders[one.threshold]), verifier, cast(Any, None), prompts,
        max_loss=BOUND, confidence=confidence, max_new_tokens=1, split_sha256=HASHES,
    )  # fmt: skip
    return 0 if found.chosen is None else candidates.index(found.chosen) + 1


def false_alarms(
    verifier: Verifier, runs: int, seed: int, confidence: float = CONFIDENCE, copies: int = 1, *, by_loss: bool = False
) -> float:
    """Share of runs in which a candidate is certified whose losses are 1 with probability ``BOUND``, else 0."""
    rng, prompts = np.random.default_rng(seed), distinct_prompts(PROMPTS * copies)
    wrong = 0
    for _ in range(runs):
        losses = (rng.random(PROMPTS) < BOUND).astype(float)
        losses = np.sort(losses) if by_loss else np.repeat(losses, copies)
        wrong += certifies(verifier, [losses.tolist()], prompts, confidence)
    return wrong / runs


def limit(runs: int) -> float:
    """The level and three standard errors: exceeded by chance in 1 of 700 tests at most."""
    return LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / runs)


def test_a_false_certificate_is_as_rare_as_promised(tiny_verifier: Verifier) -> None:
    """2,000 runs. The test looks at the p-value after every prompt, so this is peeking too, which betting allows."""
    assert 0.2 * LEVEL < false_alarms(tiny_verifier, 2000, seed=0) <= limit(2000)


def test_a_level_ten_times_too_high_is_seen(tiny_verifier: Verifier) -> None:
    """0.495 in place of 0.05."""
    assert false_alarms(tiny_verifier, 300, seed=1, confidence=1 - 2 * 9.9 * LEVEL) > limit(300)


def test_copies_are_refused_and_would_be_seen(tiny_verifier: Verifier) -> None:
    """Each prompt four times, under ids and texts that the check for copies takes for others."""
    prompt, *others = distinct_prompts(PROMPTS)
    twice = Prompt(id="again", turns=[f" {prompt.turns[0].upper()}"])
    with pytest.raises(CalibrationError, match=r"1 of 21 calibration prompts are copies of others"):
        certifies(tiny_verifier, [[0.0] * 40], [prompt, *others, twice])
    assert false_alarms(tiny_verifier, 300, seed=2, copies=4) > limit(300)


def test_prompts_that_are_sorted_by_their_loss_would_be_seen(tiny_verifier: Verifier) -> None:
    """Past the order of their hashes: then nearly every run certifies falsely."""
    assert false_alarms(tiny_verifier, 300, seed=3, by_loss=True) > 0.9


def test_the_order_of_a_file_does_not_matter(tiny_verifier: Verifier) -> None:
    """The stub of the control above is not reached by sorting a file: ``certify`` has its own order."""
    prompts = distinct_prompts(PROMPTS)
    tested = certification.in_test_order(prompts)
    assert tested == certification.in_test_order(prompts[::-1]) != prompts
    assert {prompt.id for prompt in tested} == {prompt.id for prompt in prompts}


class PeekingTest:
    """A fixed-n p-value (exact, binomial), asked after every prompt as if there had been no looks before."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.prompts = self.lost = 0
        self.p_value = 1.0

    def add(self, loss: float) -> None:
        """One more prompt."""
        self.prompts += 1
        self.lost += round(loss)
        self.p_value = float(binom.cdf(self.lost, self.prompts, self.bound))

    def least_p_value(self, prompts: int) -> float:
        """Never given up."""
        return 0.0


def test_peeking_with_a_fixed_n_test_is_seen(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certification, "BettingTest", PeekingTest)
    assert false_alarms(tiny_verifier, 200, seed=4) > limit(200)


def test_all_candidates_together_keep_the_level(tiny_verifier: Verifier) -> None:
    """Two good candidates, then five at the bound: one of these is certified in a share of ``LEVEL`` at most."""
    rng, prompts, runs = np.random.default_rng(5), distinct_prompts(PROMPTS), 300
    means = np.array([0.01, 0.02, *[BOUND] * 5])
    wrong = 0
    for _ in range(runs):
        losses = (rng.random((len(means), PROMPTS)) < means[:, None]).astype(float)
        wrong += certifies(tiny_verifier, losses.tolist(), prompts) > 2
    assert wrong / runs <= limit(runs)


@pytest.mark.parametrize(("tokens", "overdispersion"), [(24, 0.001), (24, 0.05), (64, 0.02)])
def test_a_loss_of_0_4_percent_is_certified_within_2(tokens: int, overdispersion: float) -> None:
    """279 prompts, shares of diverged tokens (beta-binomial), at 95 %: in 95 of 100 runs at least.

    Hoeffding-Bentkus on the same runs: in less than half.
    """
    rng, mean, prompts = np.random.default_rng(6), 0.004, 279
    weight = 1 / overdispersion - 1
    passed = rivals = 0
    for _ in range(100):
        shares = rng.binomial(tokens, rng.beta(mean * weight, (1 - mean) * weight, prompts)) / tokens
        passed += betting_p_value(shares, 0.02) <= 0.05
        found = compute_hoeffding_bentkus_p_value(np.array([shares.mean()]), prompts, [0.02])
        rivals += float(found[0, 0]) <= 0.05
    assert passed >= 95
    assert rivals < 50
