"""Lines of logs that could have been."""

from __future__ import annotations

from typing import Any

from viasd_calib.calibration.monitor import Watched
from viasd_calib.calibration.text_log import LoggedText, LoggedTurn

WATCH = Watched(
    policy="a" * 64, audit="off", loss="token_divergence", bound=0.1, rounding_gap=0.01, made_from=frozenset({"f" * 16})
)


def logged(number: int, departed: int = 0, tokens: int = 10, **changes: Any) -> LoggedText:
    """The line of text ``number``, with so many departures, all of them in front, of the policy of ``WATCH``."""
    places = list(range(departed))
    turn = LoggedTurn(tokens=tokens, pending=list(range(tokens)), departed=places, deficits=[1.0] * departed)
    entries: dict[str, Any] = {
        "policy": WATCH.policy,
        "audit": WATCH.audit,
        "loss": WATCH.loss,
        "value": departed / tokens,
        "rounding_gap": WATCH.rounding_gap,
        "prompt": f"{number:016x}",
        "tokens": tokens,
        "departures": departed,
        "turns": [turn],
    }
    return LoggedText(**{**entries, **changes})
