"""Speculative decoding with a draft length that the draft gate controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from viasd_calib.decoding.catch_up import VerificationRule, catch_up, lossless_rule
from viasd_calib.decoding.drafting import draft, watched_length
from viasd_calib.decoding.gates import Gate, draft_gate
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy, register
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Decoding, Gates


@register(lossless=True)
@dataclass
class Speculative(Strategy):
    """Draft a block, let q verify it (Leviathan et al. 2023, algorithm 1), with the bonus token. Lossless.

    Attributes:
        draft_length: most tokens drafted a round.
        gate: predicts agreement; drafting stops where the probability that q accepts the whole block falls below
            ``stop_below``.
        drafting_pays_at: the least share of a text's drafted tokens that must be kept for drafting to go on unreduced
            (:mod:`~viasd_calib.decoding.rolling_acceptance`); None for always.
    """

    asks_slim = False
    draft_length: int = 6
    gate: Gate | None = None
    stop_below: float = 0.0
    drafting_pays_at: float | None = None

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        gate = draft_gate(gates, device)
        return cls(decoding.draft_length, gate, gates.speculative_stop, decoding.drafting_pays_at)

    def round(self, session: Session) -> Passes[None]:
        length = watched_length(session, self.draft_length, self.drafting_pays_at)
        block = yield from draft(session, length, self.gate, self.stop_below)
        yield from catch_up(session, block, self.verification())

    def verification(self) -> VerificationRule:
        """How q verifies the block; a lossy variant overrides this."""
        return lossless_rule
