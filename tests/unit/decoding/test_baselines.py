"""Baselines against what their sources promise: lossless ones give q's text, lossy ones do at their exact end."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from tests.cases import Case, cases, lively_case
from tests.tiny import DRAFTERS, constant_gate, make_drafter
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.drafting import Block
from viasd_calib.decoding.features import DraftStatistics
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Counts
from viasd_calib.decoding.slim_decision import decide_greedy
from viasd_calib.decoding.slim_rules.margin import MarginRule
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.base import Strategy, load_strategy
from viasd_calib.decoding.strategies.lenient import Lenient
from viasd_calib.decoding.strategies.multi_level import MultiLevel
from viasd_calib.decoding.strategies.prompt_lookup import PromptLookupDecoding
from viasd_calib.decoding.strategies.self_speculative import SelfSpeculative
from viasd_calib.decoding.strategies.slim_only import SlimOnly
from viasd_calib.decoding.strategies.speculative_fixed import SpeculativeFixed
from viasd_calib.decoding.strategies.sprinter import Sprinter
from viasd_calib.decoding.strategies.static_ensemble import StaticEnsemble, draft_probs
from viasd_calib.decoding.strategies.trispec import TriSpec
from viasd_calib.decoding.strategies.via_sd_fixed import ViaSDFixed
from viasd_calib.decoding.strategies.via_sd_published import ViaSDPublished
from viasd_calib.decoding.transformers_baseline import TransformersDecoder
from viasd_calib.errors import PromptError, SamplingError
from viasd_calib.slim.cache import CacheRow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Route

SURE = Gate(constant_gate("draft_margin", 9.0))
UNSURE = Gate(constant_gate("draft_margin", -9.0))

LOSSLESS: dict[str, Strategy] = {
    "speculative_fixed": SpeculativeFixed(3),
    "self_speculative": SelfSpeculative(3),
    "prompt_lookup": PromptLookupDecoding(3),
    "multi_level": MultiLevel(draft_length=3, max_pending=12),
    "multi_level of one token": MultiLevel(draft_length=1, max_pending=4),
    "lenient at 1": Lenient(3, leniency=1.0),
    "static_ensemble at 1": StaticEnsemble(3, weight=1.0),
    "trispec that decides nothing": TriSpec(MarginRule(1.01), draft_length=3, max_pending=8),
    "sprinter that decides nothing": Sprinter(draft_gate=UNSURE, draft_length=3, max_pending=8),
}

LOSSY: dict[str, Strategy] = {
    "lenient": Lenient(3, leniency=0.05),
    "static_ensemble": StaticEnsemble(3, weight=0.2),
    "trispec": TriSpec(MarginRule(0.0), draft_length=3, max_pending=8),
    "sprinter": Sprinter(draft_gate=SURE, draft_length=3, max_pending=8),
    "via_sd_fixed": ViaSDFixed(draft_length=3, max_pending=8),
    "via_sd_published": ViaSDPublished(draft_length=3, max_pending=8),
    "slim_only": SlimOnly(),
}


@pytest.mark.parametrize("name", sorted(LOSSLESS))
@given(case=cases())
def test_a_lossless_text_is_the_verifiers_own(name: str, case: Case) -> None:
    assert case.generate(LOSSLESS[name]).tokens == case.expected


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_a_lossy_text_may_be_another(name: str) -> None:
    """What makes each rule lossy is at work: over a few texts, some diverge."""
    diverged = 0
    for seed in range(12):
        case = dataclasses.replace(lively_case(seed), drafter_kind="causal" if name == "static_ensemble" else "near")
        diverged += case.generate(LOSSY[name]).tokens != case.expected
    assert diverged


@given(case=cases())
def test_self_speculation_asks_no_drafter(case: Case) -> None:
    out = case.generate(SelfSpeculative(4))
    assert out.counts.draft_steps == 0
    assert out.counts.slim_passes >= sum(out.drafted)


def test_self_speculation_on_the_whole_model_is_never_refused() -> None:
    case = dataclasses.replace(lively_case(1), route=Route(), count=30)
    out = case.generate(SelfSpeculative(4))
    assert out.counts.rejected == 0
    assert out.counts.full_passes == 6


@pytest.mark.parametrize("drafter_kind", DRAFTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multi_level_is_exact_with_every_drafter(drafter_kind: str, dtype: torch.dtype) -> None:
    tiers: Counter[Tier] = Counter()
    for seed in range(4):
        case = dataclasses.replace(lively_case(seed), drafter_kind=drafter_kind)
        verifier = RoutedModel(copy.deepcopy(case.model).to(dtype), case.route)
        drafter = make_drafter(drafter_kind, verifier, seed, case.family)
        strategy = MultiLevel(draft_length=4, max_pending=12)
        out, plain = (
            Decoder(verifier, drafter, one).generate(case.prompt, case.count) for one in (strategy, Autoregressive())
        )
        assert out.tokens == plain.tokens
        assert out.counts.full_passes < plain.counts.full_passes
        tiers.update(out.tiers)
    assert tiers[Tier.REGENERATE]
    assert tiers[Tier.ESCALATE]


def test_multi_level_lets_the_slim_verifier_decide_until_the_pending_tokens_are_many() -> None:
    """q' is q here: q refuses nothing, and passes once for each ``max_pending`` tokens, its own block among them."""
    case = dataclasses.replace(lively_case(1), route=Route(), count=40)
    out = case.generate(MultiLevel(draft_length=3, max_pending=12))
    assert out.tokens == case.expected
    assert out.counts.full_passes <= 5
    assert out.counts.slim_passes > out.counts.full_passes
    assert max(Counter(out.tiers).values()) > 24


def slim_text(case: Case) -> list[int]:
    """What q' writes after a prompt that q has read, pass by pass."""
    verifier, text = case.verifier, [*case.prompt]
    row = CacheRow(verifier.new_cache(len(text) + case.count))
    if text[1:]:
        verifier.full(torch.tensor([text[:-1]]), row.window(0, len(text) - 1))
    for _ in range(case.count):
        states = verifier.slim(torch.tensor([text[-1:]]), row.window(len(text) - 1, 1))
        text.append(int(verifier.slim_logits(states.last[0, -1]).argmax()))
        if text[-1] in case.eos:
            break
    return text[len(case.prompt) :]


@given(case=cases())
def test_slim_only_is_the_slim_verifiers_text(case: Case) -> None:
    out = case.generate(SlimOnly())
    assert out.tokens == slim_text(case)
    assert out.counts == Counts(full_passes=0, slim_passes=len(out.tokens))
    assert {*out.tiers} == {Tier.REGENERATE}


def test_slim_only_is_labelled_lossy_and_multi_level_lossless() -> None:
    assert not load_strategy("slim_only").is_lossless("strict")
    assert load_strategy("multi_level").is_lossless("off")


def test_slim_only_on_the_whole_model_is_the_verifiers_own_text() -> None:
    case = dataclasses.replace(lively_case(1), route=Route())
    assert case.generate(SlimOnly()).tokens == case.expected


class Forbidding(LogitsProcessor):
    """Forbids every token."""

    stateless = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return torch.full_like(scores, -torch.inf)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slim_only_refuses_a_place_without_tokens(temperature: float) -> None:
    case = lively_case(1)
    sampling = Sampling(temperature=temperature)
    decoder = Decoder(case.verifier, None, SlimOnly(), case.eos, sampling, [Forbidding()])
    with pytest.raises(SamplingError, match="leave no token that may follow"):
        decoder.generate(case.prompt, 4)


def test_trispec_decides_where_the_margin_is_wide() -> None:
    """After q' alone every token that it decides is q's slim choice: it is regenerated or accepted, never both."""
    case = dataclasses.replace(lively_case(2), route=Route(), count=24)
    out = case.generate(TriSpec(MarginRule(0.0), draft_length=3, max_pending=12))
    assert out.tokens == case.expected  # q' is q here
    assert Counter(out.tiers)[Tier.ESCALATE] < len(out.tokens) / 2


def test_sprinter_calls_no_slim_verifier() -> None:
    for gate in (SURE, UNSURE):
        out = lively_case(3).generate(Sprinter(draft_gate=gate, draft_length=3, max_pending=8))
        assert out.counts.slim_passes == 0


def test_the_published_constants_leave_the_regenerate_band_empty() -> None:
    ratios = torch.linspace(0.01, 1, 200)
    for rule, regenerates in (
        (ViaSDPublished(draft_length=3, max_pending=8).rule, False),
        (ViaSDFixed(draft_length=3, max_pending=8).rule, True),
    ):
        assert rule is not None
        seen = set()
        for ratio in ratios:
            logits = torch.stack([torch.stack([torch.zeros(()), ratio.log()]), torch.zeros(2)])
            draft = DraftStatistics(torch.tensor([1]), None, torch.zeros(1))
            seen.add(bool(decide_greedy(rule.masks(logits, draft, 0), logits, gated=0).regenerate))
        assert (True in seen) == regenerates


def test_draft_probabilities_lie_on_the_verifiers_vocabulary() -> None:
    block = Block(torch.tensor([5]), torch.tensor([[0.0, 1.0]]), vocabulary=torch.tensor([2, 5]))
    probs = draft_probs(block, 6)
    assert probs[0].nonzero()[:, 0].tolist() == [2, 5]
    torch.testing.assert_close(probs[0, [2, 5]], torch.tensor([0.0, 1.0]).softmax(-1))
    assert draft_probs(Block(torch.tensor([3])), 6).tolist() == [[0, 0, 0, 1, 0, 0]]


def test_an_id_of_several_columns_has_the_mass_of_all() -> None:
    block = Block(torch.tensor([5, 5]), torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), vocabulary=torch.tensor([5, 5]))
    assert draft_probs(block, 6).tolist() == [[0, 0, 0, 0, 0, 1]] * 2


@given(case=cases())
def test_transformers_own_text(case: Case) -> None:
    out = TransformersDecoder(case.verifier, case.eos).generate(case.prompt, case.count)
    assert out.tokens == case.expected
    assert out.counts.full_passes == len(out.tokens) == len(out.tiers)


ASKED_FOR: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(8))},
    {"begin_suppress_tokens": list(range(8))},
    {"min_new_tokens": 18},
    {"min_length": 18},
    {"max_length": 10},
    {"max_new_tokens": 3},
    {"max_time": 1e-9},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"stop_strings": ["w8"]},
    {"forced_bos_token_id": 3},
    {"forced_eos_token_id": 2},
    {"return_dict_in_generate": True, "output_scores": True},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"repetition_penalty": 1.5, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"guidance_scale": 1.5},
    {"bad_words_ids": [[7], [8]]},
    {"sequence_bias": [[[5], 9.0]]},
    {"exponential_decay_length_penalty": [1, 3.0]},
    {"typical_p": 0.2, "epsilon_cutoff": 0.2, "eta_cutoff": 0.2},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash", "context_width": 1}},
    {"eos_token_id": [14, 20], "pad_token_id": 7},
]
"""Generation settings that verifiers come with; each would make another text of it, or none."""


@pytest.mark.parametrize("asked", ASKED_FOR, ids=lambda asked: "-".join(asked))
def test_the_yardstick_takes_nothing_from_generation_settings(asked: dict[str, Any]) -> None:
    case = lively_case(1, eos=frozenset({3, 5}))
    model = copy.deepcopy(case.model)
    model.generation_config = GenerationConfig(**asked)
    decoder = TransformersDecoder(RoutedModel(model), case.eos)
    for prompt in ([1, 4, 9], [8], [20, 11]):
        expected = Decoder(RoutedModel(model), None, Autoregressive(), case.eos).generate(prompt, 16).tokens
        assert decoder.generate(prompt, 16).tokens == expected
    assert model.generation_config.to_diff_dict() == GenerationConfig(**asked).to_diff_dict()


def test_generation_settings_would_change_the_text() -> None:
    """The yardstick above is put to the test by what it is given."""
    model: Any = copy.deepcopy(lively_case(1).model)
    ids = torch.tensor([[1, 4, 9]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    model.generation_config = GenerationConfig(suppress_tokens=plain[0, 3:].tolist())
    other = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert other.tolist() != plain.tolist()


@pytest.mark.parametrize("prompt", [[], [3] * 250])
def test_transformers_refuses_in_our_words(prompt: list[int]) -> None:
    with pytest.raises(PromptError):
        TransformersDecoder(lively_case(0).verifier, frozenset()).generate(prompt, 20)
