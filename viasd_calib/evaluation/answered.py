"""What a method answered to a prompt, beside what the full verifier would have written."""

from __future__ import annotations

from collections.abc import Sequence

from viasd_calib.calibration.judging import count_diverged
from viasd_calib.decoding.conversation import Turn
from viasd_calib.decoding.engine import Engine
from viasd_calib.evaluation.exactness import find_difference
from viasd_calib.evaluation.metrics import TextResult
from viasd_calib.prompts import Prompt


def text_result(engine: Engine, prompt: Prompt, turns: Sequence[Turn], reference: Sequence[Turn]) -> TextResult:
    """The turns of a prompt with what q says of them; nothing of this is timed.

    Args:
        reference: the turns of autoregressive decoding.
    """
    certificate = engine.spec.certificate
    gap = None if certificate is None else certificate.rounding_gap
    diverged = count_diverged(engine.routed, turns, gap or 0.0)
    found = (
        find_difference(
            engine.routed, prompt.id, place, turn.prompt_ids, turn.generation.tokens, expected.generation.tokens
        )
        for place, (turn, expected) in enumerate(zip(turns, reference, strict=False))
    )
    # A later turn answers another text once an earlier one has left the reference; there may also be fewer or more.
    first = next((difference for difference in found if difference is not None), None)
    generations = [turn.generation for turn in turns]
    return TextResult(prompt.id, prompt.task, generations, diverged, [] if first is None else [first])
