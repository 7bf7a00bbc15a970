"""Self-speculative decoding: q' in the draft model's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from viasd_calib.decoding.catch_up import catch_up
from viasd_calib.decoding.drafting import Block, draft_limit
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy, register
from viasd_calib.draft.base import draft_stepwise, never_stop
from viasd_calib.passes.model_passes import PassResult, SlimPass
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Decoding, Gates


@register(lossless=True)
@dataclass
class SelfSpeculative(Strategy):
    """q' drafts token by token and q verifies: SWIFT's shape (Xia et al. 2025, arXiv 2410.06916), on a fixed route.

    Samples from q; lossless.

    Attributes:
        draft_length: most tokens drafted a round.
    """

    needs_drafter: ClassVar[bool] = False
    draft_length: int = 6

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Self:
        return cls(decoding.draft_length)

    def round(self, session: Session) -> Passes[None]:
        block = yield from self._draft(session)
        yield from catch_up(session, block)

    def _draft(self, session: Session) -> Passes[Block]:
        place = session.row.exact

        def advance(ids: Tensor) -> Passes[Tensor]:
            nonlocal place
            result: PassResult = yield SlimPass(session.verifier, session.row, place, ids, wanted=1)
            place += ids.shape[0]
            session.counts.slim_passes += 1
            return result.logits[0]

        text = session.text[: session.length]
        pick = session.sampler.picker(text, session.verifier.config.vocab_size)
        limit = draft_limit(session, self.draft_length)
        proposal = yield from draft_stepwise(advance, text[place:], limit, never_stop, pick, None)
        return Block(proposal.tokens, proposal.logits, pick.proposal_probs(proposal.tokens))
