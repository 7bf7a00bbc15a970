"""Any causal language model with the verifier's vocabulary as the draft model."""

from __future__ import annotations

from torch import Tensor

from viasd_calib.draft.base import CachedDrafter, Pick, Proposal, StopRule, draft_stepwise
from viasd_calib.draft.passes import Cost, ModelPass, Passes, PassResult
from viasd_calib.errors import ModelError
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.forward import RoutedModel


class DraftPass(ModelPass):
    """A forward of a whole model that drafts."""

    cost = Cost.DRAFT


class CausalDrafter(CachedDrafter):
    """A whole model drafts, with a cache of its own.

    Args:
        model: the draft model.
        verifier_vocab: the verifier's vocabulary size; the draft model may have padding rows beyond it.

    Raises:
        ModelError: the vocabularies differ.
    """

    def __init__(self, model: RoutedModel, verifier_vocab: int) -> None:
        if model.config.vocab_size != verifier_vocab:
            raise ModelError(
                f"the draft model has {model.config.vocab_size} tokens, the verifier {verifier_vocab}; "
                "choose a draft model with the verifier's tokenizer"
            )
        self.model = model
        self.networks = (model.model,)
        self.models = (model,)

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        return self.model.new_cache(capacity, batch)

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        self.row.rollback(text.shape[0] - 1)  # the last one is run again where nothing is new
        return draft_stepwise(self._advance, text[self.row.exact :], limit, stop, pick, None)

    def _advance(self, ids: Tensor) -> Passes[Tensor]:
        start = self.row.exact
        result: PassResult = yield DraftPass(self.model, self.row, start, ids, wanted=1)
        self.row.mark_exact(start + ids.shape[0])
        self.steps += 1
        return result.logits[0]

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        length = text.shape[0]
        window = CacheWindow(self.model.new_cache(length), 0, length, length)
        logits = self.model.logits(self.model.full(text[None], window).last[0])  # [length, vocabulary]
        return logits.argmax(-1), logits
