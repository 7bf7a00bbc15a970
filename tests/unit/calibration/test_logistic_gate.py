"""Gates fitted on candidates whose truth is known."""

from __future__ import annotations

import pytest
import torch

from viasd_calib.calibration.logistic_gate import assess, fit_gate
from viasd_calib.calibration.scoring import LabelledTokens
from viasd_calib.decoding.gates import Gate
from viasd_calib.errors import CalibrationError


def drawn(seed: int, count: int = 6000) -> LabelledTokens:
    """Candidates that agree with chance sigmoid(2 margin - entropy)."""
    generator = torch.Generator().manual_seed(seed)
    margin, entropy = torch.randn(2, count, generator=generator).unbind()
    chance = torch.sigmoid(2 * margin - entropy)
    agrees = torch.rand(count, generator=generator) < chance
    return LabelledTokens({"draft_margin": margin, "draft_entropy": entropy}, agrees)


def test_a_logistic_truth_is_found_again() -> None:
    """On 6,000 held-back candidates a calibrated gate's ECE over 15 bins is below 0.03 (seen: 0.01)."""
    fitted = fit_gate(drawn(0), drawn(1), ["draft_margin", "draft_entropy"])
    assert fitted.reliability.expected_calibration_error < 0.03
    assert fitted.reliability.auroc > 0.8
    scores = Gate(fitted.gate)(drawn(2).features)
    truth = torch.sigmoid(2 * drawn(2).features["draft_margin"] - drawn(2).features["draft_entropy"])
    assert (scores - truth).abs().mean() < 0.02


def test_one_outcome_is_refused() -> None:
    held_back = drawn(0)
    with pytest.raises(CalibrationError, match="one outcome"):
        fit_gate(LabelledTokens(held_back.features, torch.ones_like(held_back.agrees)), held_back, ["draft_margin"])


def test_reliability_bins() -> None:
    scores = torch.tensor([0.01, 0.02, 0.99, 0.98, 1.0])
    found = assess(scores, torch.tensor([False, False, True, True, True]))
    assert found.count == [2, 3]
    assert found.accuracy == [0.0, 1.0]
    assert found.auroc == 1.0


def test_overconfidence_is_seen() -> None:
    found = assess(torch.full((1000,), 0.99), torch.arange(1000) % 2 == 0)
    assert found.expected_calibration_error == pytest.approx(0.49, abs=0.01)
