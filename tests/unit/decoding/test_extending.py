"""How to add a drafter or a rule: one class each, and nothing else needs to know. README points here."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import tiny_model, transformers_text
from viasd_calib.decoding.acceptance import SlimMasks
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.features import DraftStatistics
from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.base import MemorylessDrafter, Proposal
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Route

PROMPTS = st.lists(st.integers(0, 23), min_size=1, max_size=8)


class RepeatLast(MemorylessDrafter):
    """Proposes the last token over and over."""

    def propose(self, text: Tensor, limit: int) -> Proposal:
        return Proposal(text[-1:].repeat(limit), None)  # no logits: the proposal is sure of itself

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor) -> tuple[Tensor, None]:
        return text, None


class EvenPlaces(SlimRule):
    """Lets q' decide at every other place, whatever it says there."""

    def masks(self, logits: Tensor, draft: DraftStatistics, pending: int) -> SlimMasks:
        own = torch.arange(logits.shape[0], device=logits.device) % 2 == 0  # [k + 1]
        return SlimMasks(own[:-1] & (draft.tokens == logits[:-1].argmax(-1)), own)


@given(prompt=PROMPTS)
def test_a_drafter_in_one_class(prompt: list[int]) -> None:
    model = tiny_model()
    decoder = Decoder(RoutedModel(model), RepeatLast(), Speculative(3))
    out = decoder.generate(prompt, 16)
    assert out.tokens == transformers_text(model, prompt, 16, ())
    assert out.counts.draft_steps > 0


@given(prompt=PROMPTS)
def test_a_rule_in_one_class(prompt: list[int]) -> None:
    model = tiny_model()
    decoder = Decoder(RoutedModel(model, Route(attention_skip=[1])), RepeatLast(), ThreeTier(EvenPlaces()))
    out = decoder.generate(prompt, 16)
    assert out.tokens == transformers_text(model, prompt, 16, ())
    assert out.counts.slim_passes > 0
