"""How well a gate's scores are calibrated on prompts it was not fitted on: overall, by task, by place in the block.

Candidates of one prompt are not independent of each other, prompts are: intervals are drawn over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from viasd_calib.calibration.paired import FEWEST_PROMPTS, RESAMPLES, lower_percentile
from viasd_calib.calibration.scoring import LabelledTokens, ScoredText, join
from viasd_calib.decoding.gates import Gate
from viasd_calib.errors import CalibrationError

BINS = 15


class GroupError(BaseModel):
    """Expected calibration error (ECE) of some candidates.

    A binned error is above 0 even of scores that mean what they say, the more the fewer candidates there are;
    ``by_chance`` says how much. The interval has the same upward bias.

    Attributes:
        expected_calibration_error: over ``BINS`` bins of equal width, in [0, 1].
        low, high: its 95 % bootstrap interval over prompts, with expanded percentiles
            (:func:`~viasd_calib.calibration.paired.lower_percentile`); None of fewer than ``FEWEST_PROMPTS`` prompts.
        by_chance: mean of the same over outcomes drawn with the scores as their probabilities.
        candidates: how many.
        prompts: how many these are of.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    expected_calibration_error: float
    low: float | None
    high: float | None
    by_chance: float
    candidates: int = Field(ge=1)
    prompts: int = Field(ge=1)


class Reliability(BaseModel):
    """A gate on texts it was not fitted on; also an entry of the fit's JSON.

    Attributes:
        expected_calibration_error: over ``BINS`` bins of equal width: the mean over candidates of
            |accuracy - confidence| of their bin, in [0, 1].
        auroc: area under the receiver operating characteristic, in [0, 1]; 0.5 for scores that say nothing, and where
            all candidates have one outcome.
        confidence: mean score of each bin that holds anything.
        accuracy: share of candidates in it that were q's choice.
        count: candidates in it.
        overall: the calibration error with its interval; None in what earlier releases wrote.
        by_task: the same by the prompts' task; empty in what earlier releases wrote.
        by_place: the same by place in the block, the drafted tokens before the candidate since q or q' last ran.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    expected_calibration_error: float
    auroc: float
    confidence: list[float]
    accuracy: list[float]
    count: list[int]
    overall: GroupError | None = None
    by_task: dict[str, GroupError] = {}
    by_place: dict[int, GroupError] = {}


def assess(scores: Tensor, agrees: Tensor) -> Reliability:
    """Reliability of scores ([n], in [0, 1]) against outcomes ([n], bool).

    Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.

    Example:
        >>> found = assess(torch.tensor([0.25, 0.75, 0.75]), torch.tensor([False, True, True]))
        >>> found.count, found.accuracy, round(found.expected_calibration_error, 4), found.auroc
        ([1, 2], [0.0, 1.0], 0.25, 1.0)
    """
    place = _bins(scores)
    held = [place == number for number in range(BINS)]
    held = [rows for rows in held if rows.any()]
    return Reliability(
        expected_calibration_error=float(binary_calibration_error(scores, agrees.long(), n_bins=BINS)),
        auroc=0.5 if agrees.all() or not agrees.any() else float(binary_auroc(scores, agrees.long())),
        confidence=[float(scores[rows].mean()) for rows in held],
        accuracy=[float(agrees[rows].float().mean()) for rows in held],
        count=[int(rows.sum()) for rows in held],
    )


def assess_gate(
    gate: Gate, texts: Sequence[ScoredText], candidates: Callable[[ScoredText], LabelledTokens], place: str
) -> Reliability:
    """Reliability of a gate on held-back texts, over all, by task and by place in the block.

    Args:
        candidates: what the gate is asked of a text.
        place: the feature that is the place in the block.

    Raises:
        CalibrationError: the gate is asked nothing of these texts.
    """
    parts = [candidates(text) for text in texts]
    together = join(parts)
    if len(together.agrees) == 0:
        raise CalibrationError(
            f"nothing was proposed on the {len(texts)} held-back texts, so the gates cannot be assessed; capture more "
            "prompts, hold more of them back (data.validation_share), or take another drafter"
        )
    scores, agrees = gate(together.features), together.agrees
    number = {prompt: row for row, prompt in enumerate(dict.fromkeys(text.prompt for text in texts))}
    prompts = _repeated([number[text.prompt] for text in texts], parts)
    tasks = sorted({text.task for text in texts})
    task = _repeated([tasks.index(text.task) for text in texts], parts)
    depth = together.features[place].long()

    def of(rows: Tensor) -> GroupError:
        return group_error(scores[rows], agrees[rows], prompts[rows])

    return assess(scores, agrees).model_copy(
        update={
            "overall": group_error(scores, agrees, prompts),
            "by_task": {name: of(task == row) for row, name in enumerate(tasks) if (task == row).any()},
            "by_place": {int(one): of(depth == one) for one in depth.unique()},
        }
    )


def group_error(scores: Tensor, agrees: Tensor, prompts: Tensor, seed: int = 0) -> GroupError:
    """ECE of candidates with its bootstrap interval over prompts.

    With s the scores and a the outcomes, ECE = sum over bins |sum over the bin (a - s)| / n; so a resample of prompts
    is a weighted sum of their rows of bins.

    Args:
        scores: [n], in [0, 1].
        agrees: [n], bool.
        prompts: of each candidate, [n], long.
        seed: of the resamples.

    Example:
        >>> scores, agrees = torch.full((400,), 0.75), torch.arange(400) % 2 == 0
        >>> found = group_error(scores, agrees, torch.arange(400) // 20)
        >>> found.expected_calibration_error, found.low, found.high, found.prompts
        (0.25, 0.25, 0.25, 20)
    """
    _, rows = prompts.unique(return_inverse=True)
    count = int(rows.max()) + 1
    place = rows * BINS + _bins(scores)  # [n]
    differences = _row_sums(agrees.double() - scores.double(), place, count)  # [prompts, bins]
    sizes = np.bincount(rows.numpy(), minlength=count)  # [prompts]
    generator = np.random.default_rng(seed)
    low = high = None
    if count >= FEWEST_PROMPTS:
        weights = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # [resamples, prompts]
        errors = np.abs(weights @ differences).sum(-1) / (weights @ sizes)
        tail = lower_percentile(count)
        low, high = np.percentile(errors, [tail, 100 - tail]).tolist()
    drawn = torch.from_numpy(generator.random((100, len(scores)))) < scores.double()  # [draws, n]
    lucky = [np.abs(_row_sums(one.double() - scores.double(), place, count).sum(0)).sum() for one in drawn]
    return GroupError(
        expected_calibration_error=float(np.abs(differences.sum(0)).sum() / len(scores)),
        low=low,
        high=high,
        by_chance=float(np.mean(lucky) / len(scores)),
        candidates=len(scores),
        prompts=count,
    )


def _bins(scores: Tensor) -> Tensor:
    return (scores * BINS).long().clamp(max=BINS - 1)


def _row_sums(values: Tensor, place: Tensor, rows: int) -> np.ndarray:
    """Sums of values ([n]) by place in a flattened table: [rows, bins]."""
    return np.bincount(place.numpy(), weights=values.numpy(), minlength=rows * BINS).reshape(rows, BINS)


def _repeated(values: Sequence[int], parts: Sequence[LabelledTokens]) -> Tensor:
    """A value of each text, for each of its candidates: [candidates], long."""
    return torch.tensor(values).repeat_interleave(torch.tensor([len(part.agrees) for part in parts]))
