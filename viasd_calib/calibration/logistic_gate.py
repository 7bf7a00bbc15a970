"""Fitting the gates: logistic models of P(q's choice = this token | q-free features)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from viasd_calib.calibration.scoring import LabelledTokens, ScoredText, join
from viasd_calib.decoding.gates import Gate
from viasd_calib.errors import CalibrationError
from viasd_calib.spec import DRAFT_FEATURES, SLIM_FEATURES, LogisticGate

BINS = 15


class Reliability(BaseModel):
    """A gate on texts it was not fitted on; also an entry of the fit's JSON.

    Attributes:
        expected_calibration_error: over ``BINS`` bins of equal width: the mean over candidates of
            |accuracy - confidence| of their bin, in [0, 1].
        auroc: area under the receiver operating characteristic, in [0, 1]; 0.5 for scores that say nothing.
        confidence: mean score of each bin that holds anything.
        accuracy: share of candidates in it that were q's choice.
        count: candidates in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    expected_calibration_error: float
    auroc: float
    confidence: list[float]
    accuracy: list[float]
    count: list[int]


@dataclass(frozen=True)
class FittedGate:
    """A gate and how it does on held-back texts."""

    gate: LogisticGate
    reliability: Reliability


def fit_gate(fitted_on: LabelledTokens, held_back: LabelledTokens, names: Sequence[str]) -> FittedGate:
    """Fit a logistic gate and evaluate it on held-back candidates.

    Raises:
        CalibrationError: q agreed always or never, so that there is nothing to learn.
    """
    features = _matrix(fitted_on, names)
    labels = fitted_on.agrees.numpy()
    if labels.all() or not labels.any():
        raise CalibrationError(
            f"all {len(labels)} candidates have one outcome; capture more prompts or check the draft model"
        )
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(scaler.transform(features), labels)
    gate = LogisticGate(
        features=list(names),
        mean=scaler.mean_.tolist(),
        scale=scaler.scale_.tolist(),
        weight=model.coef_[0].tolist(),
        bias=float(model.intercept_[0]),
    )
    reliability = assess(Gate(gate)(held_back.features), held_back.agrees)
    return FittedGate(
        gate.model_copy(update={"expected_calibration_error": reliability.expected_calibration_error}),
        reliability,
    )


def _matrix(fitted_on: LabelledTokens, names: Sequence[str]) -> np.ndarray:
    return torch.stack([fitted_on.features[name] for name in names], -1).double().numpy()


def assess(scores: Tensor, agrees: Tensor) -> Reliability:
    """Reliability of scores ([n], in [0, 1]) against outcomes ([n], bool).

    Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.

    Example:
        >>> found = assess(torch.tensor([0.25, 0.75, 0.75]), torch.tensor([False, True, True]))
        >>> found.count, found.accuracy, round(found.expected_calibration_error, 4), found.auroc
        ([1, 2], [0.0, 1.0], 0.25, 1.0)
    """
    place = (scores * BINS).long().clamp(max=BINS - 1)
    held = [place == number for number in range(BINS)]
    held = [rows for rows in held if rows.any()]
    return Reliability(
        expected_calibration_error=float(binary_calibration_error(scores, agrees.long(), n_bins=BINS)),
        auroc=float(binary_auroc(scores, agrees.long())),
        confidence=[float(scores[rows].mean()) for rows in held],
        accuracy=[float(agrees[rows].float().mean()) for rows in held],
        count=[int(rows.sum()) for rows in held],
    )


def fit_draft_gate(texts: Sequence[ScoredText], held_back: Sequence[ScoredText]) -> FittedGate:
    """The gate that looks at the draft model alone."""
    return fit_gate(join([t.draft for t in texts]), join([t.draft for t in held_back]), DRAFT_FEATURES)


def fit_slim_gate(texts: Sequence[ScoredText], held_back: Sequence[ScoredText]) -> FittedGate:
    """The gate that looks at q' as well: one model for drafted tokens and for q's slim choices."""
    return fit_gate(_slim_candidates(texts), _slim_candidates(held_back), SLIM_FEATURES)


def _slim_candidates(texts: Sequence[ScoredText]) -> LabelledTokens:
    return join([kind for text in texts for kind in (text.accept, text.own, text.own_alone)])
