"""How well the gates of a spec are calibrated on unseen prompts, at the places where its decoder asks them."""

from __future__ import annotations

from collections.abc import Sequence

from viasd_calib.calibration.reliability import Reliability, assess_gate
from viasd_calib.calibration.scoring import ScoredText, run_by_run, score_texts
from viasd_calib.decoding.gates import Gate
from viasd_calib.progress import tracked
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Gates
from viasd_calib.traces.texts import TraceText


def assess_gates(model: RoutedModel, gates: Gates, texts: Sequence[TraceText], max_run: int) -> dict[str, Reliability]:
    """Reliability of a spec's fitted gates by ``draft`` and ``slim``; a gate that is asked nothing is left out.

    q' runs as it decodes, one pass over each run of pending tokens.

    Args:
        texts: with what the spec's draft model proposes, as a capture logs it.
        max_run: longest run of pending tokens.

    Raises:
        TraceError: the texts were captured without a drafter.
    """
    if gates.draft is None and gates.slim is None:
        return {}
    scored = list(tracked(score_texts(model, texts, max_run, read=run_by_run), "gates", len(texts), "texts"))
    found: dict[str, Reliability] = {}
    if gates.draft is not None and any(text.blocks.drafted.any() for text in scored):
        found["draft"] = assess_gate(Gate(gates.draft), scored, ScoredText.draft_candidates, "draft_depth")
    if gates.slim is not None:
        found["slim"] = assess_gate(Gate(gates.slim), scored, ScoredText.slim_candidates, "block_place")
    return found
