"""q' alone, without q: how fast, and how far from q's text, a slim verifier is by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.catch_up import choose_next
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy, register
from viasd_calib.passes.model_passes import PassResult, SlimPass
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Audit, Decoding, Gates


@register(lossless=False)
@dataclass
class SlimOnly(Strategy):
    """q' alone, one token a pass, as where a model is replaced by its low-bit or pruned copy. Lossy.

    q reads the prompt, as for every strategy, and nothing after it: q' attends to what q wrote of the prompt, and to
    what it wrote itself of the text. Samples from q'.
    """

    needs_drafter: ClassVar[bool] = False
    audit: Audit = "off"

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls()

    def round(self, session: Session) -> Passes[None]:
        start, text = session.row.provisional, session.text[: session.length]
        result: PassResult = yield SlimPass(session.verifier, session.row, start, text[start:], wanted=1)
        session.counts.slim_passes += 1
        next_token, token = yield from choose_next(session, result.logits)
        session.emit(next_token[None], [token], Tier.REGENERATE, drafted=False)
        session.row.mark_provisional(session.length - 1)
