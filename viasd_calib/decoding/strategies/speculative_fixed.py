"""Speculative decoding with blocks of one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from viasd_calib.decoding.strategies.base import register
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.spec import Decoding, Gates


@register(lossless=True)
@dataclass
class SpeculativeFixed(Speculative):
    """Speculative decoding with blocks of one length (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

    Samples from q; lossless.
    """

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls(decoding.draft_length)
