"""Gates with random weights, and gates of one answer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from viasd_calib.spec import Gates, LogisticGate


def random_gate(names: Sequence[str], seed: int, bias: float = 0.0) -> LogisticGate:
    """A gate with random weights over ``names``."""
    rng = random.Random(seed)
    count = len(names)
    return LogisticGate(
        features=list(names),
        mean=[rng.uniform(-1, 1) for _ in names],
        scale=[rng.uniform(0.5, 2) for _ in names],
        weight=[rng.uniform(-1, 1) / count for _ in names],
        bias=bias,
    )


def constant_gate(name: str, logit: float) -> LogisticGate:
    """A gate that gives every token the score sigmoid(``logit``)."""
    return LogisticGate(features=[name], mean=[0.0], scale=[1.0], weight=[0.0], bias=logit)


def trusting_gates() -> Gates:
    """Gates that always take q' at its word, and never the drafter."""
    return Gates(
        draft=constant_gate("draft_depth", 0.0), slim=constant_gate("slim_margin", 0.0),
        draft_accept_at=2.0, accept_at=2.0, regenerate_at=0.2,
    )  # fmt: skip
