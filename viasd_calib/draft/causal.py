"""Any causal language model with the verifier's vocabulary as the draft model."""

from __future__ import annotations

import torch
from torch import Tensor

from viasd_calib.draft.base import CachedDrafter, Pick, Proposal, StopRule, draft_stepwise
from viasd_calib.draft.passes import Cost, ModelPass, Passes, PassResult
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.forward import RoutedModel


class DraftPass(ModelPass):
    """A forward of a whole model that drafts."""

    cost = Cost.DRAFT


class CausalDrafter(CachedDrafter):
    """A whole model drafts, with a cache of its own.

    Matrices of models with one tokenizer may be padded to different heights. Rows beyond the verifier's are left out,
    so that no id is proposed which the verifier does not have; where the draft model has fewer, its own are the only
    ones proposed, and an id that it does not have, which stands for no token, it reads as its last one.

    Args:
        model: the draft model; its tokenizer is the verifier's.
        verifier_vocab: rows of the verifier's output.
    """

    def __init__(self, model: RoutedModel, verifier_vocab: int) -> None:
        self._rows = model.config.vocab_size
        self._columns = min(self._rows, verifier_vocab)
        self._padded = self._rows < verifier_vocab
        self.vocabulary = torch.arange(self._rows, device=model.device) if self._padded else None
        self.model = model
        self.networks = (model.model,)
        self.models = (model,)

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        return self.model.new_cache(capacity, batch)

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        self.row.rollback(text.shape[0] - 1)  # the last one is run again where nothing is new
        return draft_stepwise(self._advance, text[self.row.exact :], limit, stop, pick, self.vocabulary)

    def _advance(self, ids: Tensor) -> Passes[Tensor]:
        start = self.row.exact
        result: PassResult = yield DraftPass(self.model, self.row, start, self._own(ids), wanted=1)
        self.row.mark_exact(start + ids.shape[0])
        self.steps += 1
        return result.logits[0, : self._columns]

    def _own(self, ids: Tensor) -> Tensor:
        """A text's ids as the draft model reads them."""
        return ids.clamp(max=self._rows - 1) if self._padded else ids

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        length = text.shape[0]
        window = CacheWindow(self.model.new_cache(length), 0, length, length)
        logits = self.model.logits(self.model.full(self._own(text)[None], window).last[0])  # [length, rows]
        logits = logits[:, : self._columns].contiguous()
        return logits.argmax(-1), logits
