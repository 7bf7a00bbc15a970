"""Fitting the gates: logistic models of P(q's choice = this token | q-free features)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from viasd_calib.calibration.reliability import Reliability, assess_gate
from viasd_calib.calibration.scoring import LabelledTokens, ScoredText, join
from viasd_calib.decoding.gates import Gate
from viasd_calib.errors import CalibrationError
from viasd_calib.spec import DRAFT_FEATURES, SLIM_FEATURES, LogisticGate


@dataclass(frozen=True)
class FittedGate:
    """A gate and how it does on held-back texts."""

    gate: LogisticGate
    reliability: Reliability


def fit_gate(fitted_on: LabelledTokens, names: Sequence[str]) -> LogisticGate:
    """Fit a logistic gate.

    Raises:
        CalibrationError: q agreed always or never, so that there is nothing to learn, or nothing was asked.
    """
    labels = fitted_on.agrees.numpy()
    if len(labels) == 0:
        raise CalibrationError("nothing was proposed on these texts; capture more prompts, or with another drafter")
    if labels.all() or not labels.any():
        raise CalibrationError(
            f"all {len(labels)} candidates have one outcome; capture more prompts or check the draft model"
        )
    features = _matrix(fitted_on, names)
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(scaler.transform(features), labels)
    return LogisticGate(
        features=list(names),
        mean=scaler.mean_.tolist(),
        scale=scaler.scale_.tolist(),
        weight=model.coef_[0].tolist(),
        bias=float(model.intercept_[0]),
    )


def _matrix(fitted_on: LabelledTokens, names: Sequence[str]) -> np.ndarray:
    return torch.stack([fitted_on.features[name] for name in names], -1).double().numpy()


def fit_draft_gate(texts: Sequence[ScoredText], held_back: Sequence[ScoredText]) -> FittedGate:
    """The gate that looks at the draft model alone, fitted where there is a proposal.

    Raises:
        CalibrationError: q agreed always or never, or nothing was proposed.
    """
    return _fitted(texts, held_back, ScoredText.draft_candidates, DRAFT_FEATURES, "draft_depth")


def fit_slim_gate(texts: Sequence[ScoredText], held_back: Sequence[ScoredText]) -> FittedGate:
    """The gate that looks at q' as well: one model for drafted tokens and for q's slim choices.

    Raises:
        CalibrationError: q agreed always or never.
    """
    return _fitted(texts, held_back, ScoredText.slim_candidates, SLIM_FEATURES, "block_place")


def _fitted(
    texts: Sequence[ScoredText],
    held_back: Sequence[ScoredText],
    candidates: Callable[[ScoredText], LabelledTokens],
    names: Sequence[str],
    place: str,
) -> FittedGate:
    """Fit on what a gate is asked of ``texts``, and assess on what it is asked of ``held_back``."""
    gate = fit_gate(join([candidates(text) for text in texts]), names)
    found = assess_gate(Gate(gate), held_back, candidates, place)
    error = found.expected_calibration_error
    return FittedGate(gate.model_copy(update={"expected_calibration_error": error}), found)
