"""Any causal language model with the verifier's vocabulary as the draft model."""

from __future__ import annotations

from torch import Tensor

from viasd_calib.draft.base import Drafter, Pick, Proposal, StopRule, draft_stepwise
from viasd_calib.errors import ModelError
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.forward import RoutedModel


class CausalDrafter(Drafter):
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
        self.cache: SharedCache | None = None

    def start(self, capacity: int) -> None:
        self.steps = 0
        self.cache = self.model.new_cache(capacity)

    def rollback(self, length: int) -> None:
        assert self.cache is not None, "start comes first"
        self.cache.rollback(length)

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Proposal:
        return draft_stepwise(self._advance, text[self._seen(text) :], limit, stop, pick)

    def _seen(self, text: Tensor) -> int:
        """Positions already in the cache; the last one is run again where nothing is new."""
        assert self.cache is not None, "start comes first"
        seen = min(self.cache.exact, text.shape[0] - 1)
        self.cache.rollback(seen)
        return seen

    def _advance(self, ids: Tensor) -> Tensor:
        assert self.cache is not None, "start comes first"
        start, width = self.cache.exact, ids.shape[0]
        window = CacheWindow(self.cache, start, width, start + width)
        hidden = self.model.full(ids[None], window).last[0, -1]  # [hidden]
        self.cache.mark_exact(start + width)
        self.steps += 1
        return self.model.logits(hidden)

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        length = text.shape[0]
        window = CacheWindow(self.model.new_cache(length), 0, length, length)
        logits = self.model.logits(self.model.full(text[None], window).last[0])  # [length, vocabulary]
        return logits.argmax(-1), logits
