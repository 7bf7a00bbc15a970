"""Calibration errors by group, and their intervals, on scores whose truth is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error

from tests.tiny import constant_gate
from viasd_calib.calibration.reliability import BINS, assess, assess_gate, group_error
from viasd_calib.calibration.scoring import LabelledTokens, ScoredText
from viasd_calib.decoding.gates import Gate
from viasd_calib.errors import CalibrationError
from viasd_calib.replay.blocks import ReplayedBlocks


def test_reliability_bins() -> None:
    scores = torch.tensor([0.01, 0.02, 0.99, 0.98, 1.0])
    found = assess(scores, torch.tensor([False, False, True, True, True]))
    assert found.count == [2, 3]
    assert found.accuracy == [0.0, 1.0]
    assert found.auroc == 1.0


def test_overconfidence_is_seen() -> None:
    found = assess(torch.full((1000,), 0.99), torch.arange(1000) % 2 == 0)
    assert found.expected_calibration_error == pytest.approx(0.49, abs=0.01)


@given(seed=st.integers(0, 1000), count=st.integers(1, 200))
def test_a_groups_error_is_that_of_torchmetrics(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, generator=generator)
    agrees = torch.rand(count, generator=generator) < 0.5
    found = group_error(scores, agrees, torch.arange(count) // 3)
    wanted = float(binary_calibration_error(scores, agrees.long(), n_bins=BINS))
    assert found.expected_calibration_error == pytest.approx(wanted, abs=1e-5)
    assert (found.candidates, found.prompts) == (count, -(-count // 3))
    assert (found.low is None) == (found.prompts < 6)


def test_an_interval_is_drawn_over_prompts() -> None:
    """Where all candidates of a prompt have one outcome, the interval is as wide as that of as many candidates as there
    are prompts: about sqrt(20) times that of independent ones. A factor of 2 is asked for."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.full((2000,), 0.5)
    together = (torch.rand(100, generator=generator) < 0.6).repeat_interleave(20)
    apart = together[torch.randperm(2000, generator=generator)]
    prompts = torch.arange(100).repeat_interleave(20)
    wide, narrow = group_error(scores, together, prompts), group_error(scores, apart, prompts)
    assert wide.expected_calibration_error == pytest.approx(narrow.expected_calibration_error)
    widths = [(one.high or 0.0) - (one.low or 0.0) for one in (wide, narrow)]
    assert widths[0] > 2 * widths[1] > 0


def test_scores_that_are_right_show_the_error_of_chance() -> None:
    """Outcomes drawn with the scores: over 50 draws the mean error is that by chance. Its standard error is below 7 %
    of it, so that a bound of 30 % gives a false alarm less than once in 10^4."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(300, generator=generator)
    prompts = torch.arange(300) // 10
    drawn = [group_error(scores, torch.rand(300, generator=generator) < scores, prompts, seed) for seed in range(50)]
    errors = torch.tensor([one.expected_calibration_error for one in drawn])
    assert float(errors.mean()) == pytest.approx(drawn[0].by_chance, rel=0.3)


def scored(prompt: str, task: str, depth: list[int], agrees: list[bool], drafted: list[bool]) -> ScoredText:
    tokens = LabelledTokens({"draft_depth": torch.tensor(depth).float()}, torch.tensor(agrees))
    mask = torch.tensor(drafted)
    return ScoredText(tokens, tokens, tokens, tokens, mask, ReplayedBlocks(mask, ~mask, mask.long()), prompt, task)


def test_groups_are_by_task_and_by_place() -> None:
    texts = [
        scored("a", "qa", [0, 1, 2], [True, True, False], [True, True, False]),
        scored("a", "qa", [0], [True], [True]),
        scored("b", "coding", [0, 1], [False, True], [True, True]),
        scored("c", "chat", [0], [False], [False]),
    ]
    gate = Gate(constant_gate("draft_depth", 0.0))  # 0.5 everywhere
    found = assess_gate(gate, texts, ScoredText.draft_candidates, "draft_depth")
    assert found.overall is not None
    assert (found.overall.candidates, found.overall.prompts) == (5, 2)
    assert {name: (one.candidates, one.prompts) for name, one in found.by_task.items()} == {
        "qa": (3, 1), "coding": (2, 1),
    }  # fmt: skip
    assert {name: one.candidates for name, one in found.by_place.items()} == {0: 3, 1: 2}
    assert found.by_task["qa"].expected_calibration_error == pytest.approx(0.5)
    assert found.by_place[0].expected_calibration_error == pytest.approx(1 / 6)
    assert found.expected_calibration_error == pytest.approx(found.overall.expected_calibration_error)


def test_nothing_to_assess_on_is_refused() -> None:
    text = scored("a", "qa", [0], [True], [False])
    with pytest.raises(CalibrationError, match="nothing was proposed on the 1 held-back texts"):
        assess_gate(Gate(constant_gate("draft_depth", 0.0)), [text], ScoredText.draft_candidates, "draft_depth")
