"""From a text that was judged while it was decoded to the line of a log."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from viasd_calib.calibration.judging import JudgedPrompt
from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.calibration.monitor import Watched
from viasd_calib.calibration.text_log import LoggedText, LoggedTurn
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.conversation import Turn
from viasd_calib.errors import CalibrationError
from viasd_calib.prompt_copies import SHORT, normalised_sha256
from viasd_calib.prompts import Prompt
from viasd_calib.spec import Audit


def logged_text(watch: Watched, audit: Audit, prompt: Prompt, turns: Sequence[Turn]) -> LoggedText:
    """The line of a log for the answers to a prompt.

    Args:
        audit: that was in force.
        turns: of a decoder that judges (:class:`~viasd_calib.decoding.decoder.Decoder`), one at least.

    Raises:
        CalibrationError: a turn was not judged, or the certified loss cannot be computed from what catch-up gives.
    """
    deficits: list[list[float]] = []
    for turn in turns:
        if turn.generation.deficits is None:
            raise CalibrationError(
                f"the answer to prompt {prompt.id!r} was not judged; decode it to its end with a decoder that judges "
                "(engine.decoder(judge=True))"
            )
        deficits.append(turn.generation.deficits)
    logged = [
        _logged_turn(turn.generation.tiers, found, watch.rounding_gap)
        for turn, found in zip(turns, deficits, strict=True)
    ]
    judged = JudgedPrompt(prompt, turns, [torch.tensor(found) for found in deficits], watch.rounding_gap)
    return LoggedText(
        policy=watch.policy,
        audit=audit,
        loss=watch.loss,
        value=_value(watch.loss, judged),
        rounding_gap=watch.rounding_gap,
        prompt=normalised_sha256(prompt)[:SHORT],
        tokens=sum(turn.tokens for turn in logged),
        departures=sum(len(turn.departed) for turn in logged),
        turns=logged,
    )


def _logged_turn(tiers: Sequence[Tier], deficits: Sequence[float], rounding_gap: float) -> LoggedTurn:
    departed = [place for place, deficit in enumerate(deficits) if deficit > rounding_gap]
    return LoggedTurn(
        tokens=len(tiers),
        pending=[place for place, tier in enumerate(tiers) if tier is not Tier.ESCALATE],
        departed=departed,
        deficits=[deficits[place] for place in departed],
    )


def _value(loss: str, judged: JudgedPrompt) -> float:
    """A text's loss, of what its catch-ups found."""
    try:
        value = loss_named(loss).of_prompt(judged)
    except Exception as error:  # of a loss of the user's own, which may ask for what is not there
        raise CalibrationError(
            f"the certified loss {loss} cannot be computed from the audits of the answer to prompt "
            f"{judged.prompt.id!r} ({type(error).__name__}: {error}); a loss that takes more than deficits, as a "
            "reference answer, can be watched on prompts that have it alone"
        ) from error
    if not 0 <= value <= 1:
        raise CalibrationError(f"the certified loss {loss} of prompt {judged.prompt.id!r} is {value}, not in [0, 1]")
    return value
