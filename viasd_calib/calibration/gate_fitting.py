"""The first gates: from a route and traces to fitted gates and held-back scores, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from viasd_calib.calibration.candidates import TierScores, tier_scores
from viasd_calib.calibration.logistic_gate import FittedGate, fit_draft_gate, fit_slim_gate
from viasd_calib.calibration.scoring import ScoredText, SlimReader, at_once, score_texts
from viasd_calib.errors import TraceError
from viasd_calib.progress import tracked
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.low_bit import WIDENED_BYTES, widened_weights
from viasd_calib.traces.texts import TraceText


@dataclass(frozen=True)
class FittedGates:
    """Gates fitted on traces.

    Attributes:
        agreement: of q' with q on held-back texts, at generated places, q's cache.
        scores: of the held-back texts, from which candidates are proposed.
    """

    draft: FittedGate
    slim: FittedGate
    scores: TierScores
    agreement: float


def fit_gates(
    model: RoutedModel,
    texts: Sequence[TraceText],
    held_back: Sequence[TraceText],
    max_run: int,
    widened_bytes: int = WIDENED_BYTES,
    read: SlimReader = at_once,
) -> FittedGates:
    """Fit draft and slim gate on ``texts`` and evaluate them on ``held_back``; texts without a drafter are left out.

    Args:
        widened_bytes: memory for low-bit weights that are held in float32 meanwhile; the rest is widened at each pass.
        read: how q' runs.

    Raises:
        TraceError: the traces were captured without a drafter, or hold one prompt alone.
        CalibrationError: q agreed always or never, or nothing was proposed.
    """
    with widened_weights(model.slim_networks, widened_bytes):
        fitted_on = _score(model, _other_prompts(texts, held_back), max_run, read, "scoring fit texts")
        evaluated_on = _score(model, held_back, max_run, read, "scoring held-back texts")
    draft = fit_draft_gate(fitted_on, evaluated_on)
    slim = fit_slim_gate(fitted_on, evaluated_on)
    scores = tier_scores(draft.gate, slim.gate, evaluated_on)
    return FittedGates(draft, slim, scores, float(scores.own_agrees.float().mean()))


def _other_prompts(texts: Sequence[TraceText], held_back: Sequence[TraceText]) -> list[TraceText]:
    """The texts whose prompts are not held back.

    Where a data module holds back nothing by hash it gives its last text for both.

    Raises:
        TraceError: there is no other prompt, so that nothing could be said of the gates.
    """
    held = {text.prompt_hash for text in held_back}
    others = [text for text in texts if text.prompt_hash not in held]
    if not others:
        raise TraceError(
            f"gates need prompts to be fitted on and others to be assessed on, and all {len(texts)} texts are of "
            "prompts that are held back; capture more prompts"
        )
    return others


def _score(
    model: RoutedModel, texts: Sequence[TraceText], max_run: int, read: SlimReader, description: str
) -> list[ScoredText]:
    drafted = [text for text in texts if len(text.p_token)] or texts  # of none but such, scoring complains
    return list(tracked(score_texts(model, drafted, max_run, read=read), description, len(drafted), "texts"))
