"""Autoregressive decoding: the reference of every comparison."""

from __future__ import annotations

from typing import Self

import torch

from viasd_calib.decoding.catch_up import catch_up
from viasd_calib.decoding.drafting import no_block
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy, register
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Decoding, Gates


@register(lossless=True)
class Autoregressive(Strategy):
    """q alone, one token a pass: catch-up with nothing drafted. Lossless by definition."""

    needs_drafter = False
    asks_slim = False

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls()

    def round(self, session: Session) -> Passes[None]:
        return catch_up(session, no_block(session))
