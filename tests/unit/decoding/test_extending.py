"""How to add a drafter, a rule or a strategy: one module each (docs/extending)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import tiny_model, tiny_tokenizer, transformers_text, verifier_ref
from viasd_calib import choices
from viasd_calib.decoding import strategies
from viasd_calib.decoding.acceptance import SlimMasks
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.features import DraftStatistics
from viasd_calib.decoding.slim_rules import base as slim_rules
from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.strategies.base import load_strategy
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.base import MemorylessDrafter, Proposal, builds
from viasd_calib.draft.build import build_drafter, name_draft
from viasd_calib.errors import ModelError
from viasd_calib.evaluation.bench import is_lossless
from viasd_calib.models import Verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Decoding, Gates, PromptLookupDraft, Route

RATIO: dict[str, Any] = {"convention": "ratio", "escalate_below": 0.5}
PROMPTS = st.lists(st.integers(0, 23), min_size=1, max_size=8)


class RepeatLast(MemorylessDrafter):
    """Proposes the last token over and over."""

    def propose(self, text: Tensor, limit: int) -> Proposal:
        return Proposal(text[-1:].repeat(limit), None)  # no logits: the proposal is sure of itself

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0) -> tuple[Tensor, None]:
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


ONE_DRAFT = """
from viasd_calib.decoding.catch_up import catch_up
from viasd_calib.decoding.drafting import draft
from viasd_calib.decoding.strategies.base import Strategy, register


@register(lossless=True)
class OneDraft(Strategy):
    asks_slim = False

    @classmethod
    def from_spec(cls, gates, decoding, device="cpu"):
        return cls()

    def round(self, session):
        block = yield from draft(session, 1, None, 0.0)
        yield from catch_up(session, block)
"""


def test_a_strategy_in_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, engine and benchmark know it from its module."""
    (tmp_path / "one_draft.py").write_text(ONE_DRAFT, encoding="utf-8")
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    assert choices._modules(str(tmp_path)) == ("one_draft",)
    assert is_lossless("one_draft", "off")
    found = load_strategy("one_draft")
    assert found.name == "one_draft"
    model, prompt = tiny_model(), [3, 1, 4]
    decoder = Decoder(RoutedModel(model), RepeatLast(), found.from_spec(Gates(accept_at=0.7, **RATIO), Decoding()))
    assert decoder.generate(prompt, 16).tokens == transformers_text(model, prompt, 16, ())


@pytest.mark.parametrize("name", choices.STRATEGIES)
def test_each_module_of_strategies_registers_one_by_its_name(name: str) -> None:
    assert load_strategy(name).name == name


@pytest.mark.parametrize("rule", ["calibrated", "ratio", "margin"])
def test_each_module_of_slim_rules_registers_one_by_its_name(rule: str) -> None:
    import_module(f"viasd_calib.decoding.slim_rules.{rule}")
    assert rule in slim_rules._REGISTERED


def test_a_drafter_is_built_by_its_module() -> None:
    class Entry:
        """What a spec would say of it."""

    builds(Entry)(lambda _entry, _context: RepeatLast())
    drafter = build_drafter(Entry(), Path(), RoutedModel(tiny_model()))  # type: ignore[arg-type]
    assert isinstance(drafter, RepeatLast)


def test_a_drafter_that_needs_no_settings_is_named_by_its_kind() -> None:
    assert name_draft("prompt_lookup") == (PromptLookupDraft(), Path())


def test_a_decoder_refuses_a_verifier_that_is_not_opened() -> None:
    verifier: Any = Verifier(tiny_model(), tiny_tokenizer(), verifier_ref())
    with pytest.raises(ModelError, match=r"not a Verifier; give engine\.routed, or"):
        Decoder(verifier, RepeatLast(), Speculative(3))
