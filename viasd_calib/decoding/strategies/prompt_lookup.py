"""Prompt lookup alone: what followed the same tokens earlier in the text is verified by q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from viasd_calib.decoding.catch_up import catch_up
from viasd_calib.decoding.drafting import Block, draft_limit
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy, register
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Decoding, Gates


@register(lossless=True)
@dataclass
class PromptLookupDecoding(Strategy):
    """Speculative decoding without a draft model (Saxena 2023, prompt lookup decoding), whatever the spec drafts with.

    Samples from q; lossless.

    Attributes:
        draft_length: most tokens looked up a round.
        max_ngram: longest tail of the text that is looked up; it is tried first.
        min_ngram: shortest one.
    """

    needs_drafter: ClassVar[bool] = False
    asks_slim = False
    draft_length: int = 6
    max_ngram: int = 3
    min_ngram: int = 1

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls(decoding.draft_length)

    def round(self, session: Session) -> Passes[None]:
        text = session.text[: session.length]
        limit = draft_limit(session, self.draft_length)
        tokens = PromptLookup(self.max_ngram, self.min_ngram).propose(text, limit).tokens  # [0 to limit]
        pick = session.sampler.picker(text, session.verifier.config.vocab_size)
        yield from catch_up(session, Block(tokens, proposal_probs=pick.proposal_probs(tokens)))
