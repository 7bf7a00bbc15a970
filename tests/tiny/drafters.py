"""Drafters for tiny verifiers, from one that is never right to the verifier itself."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tiny.models import LAYERS, noisy_copy, tiny_model, wide_model
from viasd_calib.draft.base import Drafter, GreedyPick, Pick, Proposal, StopRule, TextDrafter, never_stop
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.draft.shallow import ShallowDrafter, ShallowModel
from viasd_calib.passes.requests import Passes, at_once, finish
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import ShallowShape

DRAFTERS = (
    *("lookup", "causal", "near", "itself", "shallow", "random", "lookup+shallow", "lookup+near"),
    *("window+shallow", "lookup+window+near"),
)
WINDOW = 2
"""How many of a prompt's last tokens the drafters ``window+`` read."""


def tiny_shape(num_layers: int = 2, head_vocab: int = 12, taps: tuple[int, ...] = (1, LAYERS)) -> ShallowShape:
    """Sizes of a shallow drafter for a tiny verifier."""
    return ShallowShape(num_layers=num_layers, head_vocab=head_vocab, taps=taps)


def tiny_shallow(verifier: RoutedModel, seed: int = 0, head_vocab: int = 12) -> ShallowModel:
    """A shallow drafter with random weights on half of the vocabulary."""
    torch.manual_seed(seed)
    model = ShallowModel(verifier, tiny_shape(head_vocab=head_vocab))
    model.use_vocabulary(torch.randperm(verifier.config.vocab_size)[:head_vocab].sort().values)
    for linear in (model.from_token, model.from_taps, model.from_own):
        torch.nn.init.normal_(linear.weight, std=0.3)
    return model.eval().requires_grad_(False)


def propose(drafter: TextDrafter, text: Tensor, limit: int, stop: StopRule = never_stop) -> Proposal:
    """A drafter's greedy proposal."""
    return finish(drafter.propose(text, limit, stop, GreedyPick()))


class RandomDrafter(Drafter):
    """Proposes anything at all, with a distribution that has nothing to do with it."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.seed = seed

    def start(self, capacity: int) -> TextDrafter:
        return RandomTextDrafter(self.vocab, self.seed)

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0) -> tuple[Tensor, Tensor]:
        logits = torch.randn(text.shape[0], self.vocab, generator=torch.Generator().manual_seed(self.seed))
        return logits.argmax(-1), logits


class RandomTextDrafter(TextDrafter):
    """Draws on from what it has drawn for the same text."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        self.steps += limit
        tokens = torch.randint(self.vocab, (limit,), generator=self.generator)
        return at_once(Proposal(tokens, 3 * torch.randn(limit, self.vocab, generator=self.generator)))


def make_drafter(kind: str, verifier: RoutedModel, seed: int = 0, family: str = "llama") -> Drafter:
    """A drafter for ``tiny_model(seed, family)``, from one that is never right to the verifier itself.

    It calculates in the verifier's type.
    """
    vocab = verifier.config.vocab_size
    if kind.startswith("lookup+"):
        inner = make_drafter(kind.removeprefix("lookup+"), verifier, seed, family)
        return CombinedDrafter(inner, vocab, max_ngram=3, min_ngram=2)
    if kind.startswith("window+"):
        inner = make_drafter(kind.removeprefix("window+"), verifier, seed, family)
        assert isinstance(inner, CausalDrafter | ShallowDrafter)
        inner.prompt_window = WINDOW
        return inner
    if kind == "lookup":
        return PromptLookup()
    wide = verifier.dtype == torch.float64
    if kind == "causal":
        model = wide_model(seed + 100, family, layers=2) if wide else tiny_model(seed + 100, family, layers=2)
        return CausalDrafter(RoutedModel(model), vocab)
    if kind == "near":
        return CausalDrafter(RoutedModel(wide_model(seed, family, 0.05) if wide else noisy_copy(seed, family)), vocab)
    if kind == "itself":
        return CausalDrafter(RoutedModel(wide_model(seed, family) if wide else tiny_model(seed, family)), vocab)
    if kind == "shallow":
        return ShallowDrafter(tiny_shallow(verifier, seed))
    return RandomDrafter(vocab, seed)
