"""Baselines against what their sources promise: lossless ones give q's text, lossy ones do at their exact end."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given

from tests.cases import Case, cases, lively_case
from tests.tiny import constant_gate
from viasd_calib.decoding.baselines import (
    Lenient,
    SelfSpeculative,
    SpeculativeFixed,
    StaticEnsemble,
    TransformersDecoder,
    draft_probs,
    sprinter,
    trispec,
    via_sd_fixed,
    via_sd_published,
)
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.policies import Tier, judge
from viasd_calib.decoding.rounds import Block, Method
from viasd_calib.errors import PromptError
from viasd_calib.spec import Route

SURE = Gate(constant_gate("draft_margin", 9.0))
UNSURE = Gate(constant_gate("draft_margin", -9.0))

LOSSLESS: dict[str, Method] = {
    "speculative_fixed": SpeculativeFixed(3),
    "self_speculative": SelfSpeculative(3),
    "lenient at 1": Lenient(3, leniency=1.0),
    "static_ensemble at 1": StaticEnsemble(3, weight=1.0),
    "trispec that never trusts": trispec(3, 8, least=1.01),
    "sprinter that never trusts": sprinter(UNSURE, 3, 8),
}

LOSSY: dict[str, Method] = {
    "lenient": Lenient(3, leniency=0.05),
    "static_ensemble": StaticEnsemble(3, weight=0.2),
    "trispec": trispec(3, 8, least=0.0),
    "sprinter": sprinter(SURE, 3, 8),
    "via_sd_fixed": via_sd_fixed(3, 8),
    "via_sd_published": via_sd_published(3, 8),
}


@pytest.mark.parametrize("name", sorted(LOSSLESS))
@given(case=cases())
def test_a_lossless_text_is_the_verifiers_own(name: str, case: Case) -> None:
    assert case.generate(LOSSLESS[name]).tokens == case.expected


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_a_lossy_text_may_be_another(name: str) -> None:
    """What makes each rule lossy is at work: over a few texts, some stray."""
    strayed = 0
    for seed in range(12):
        case = dataclasses.replace(lively_case(seed), drafter_kind="causal" if name == "static_ensemble" else "near")
        strayed += case.generate(LOSSY[name]).tokens != case.expected
    assert strayed


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


def test_trispec_decides_where_the_margin_is_wide() -> None:
    """Behind q' alone every trusted token is q's slim choice: it is regenerated or accepted, never both."""
    case = dataclasses.replace(lively_case(2), route=Route(), count=24)
    out = case.generate(trispec(3, 12, least=0.0))
    assert out.tokens == case.expected  # q' is q here
    assert Counter(out.tiers)[Tier.ESCALATE] < len(out.tokens) / 2


def test_sprinter_calls_no_slim_verifier() -> None:
    for gate in (SURE, UNSURE):
        out = lively_case(3).generate(sprinter(gate, 3, 8))
        assert out.counts.slim_passes == 0


def test_the_published_constants_leave_the_regenerate_band_empty() -> None:
    ratios = torch.linspace(0.01, 1, 200)
    for rule, regenerates in ((via_sd_published(3, 8).rule, False), (via_sd_fixed(3, 8).rule, True)):
        assert rule is not None
        seen = set()
        for ratio in ratios:
            logits = torch.stack([torch.stack([torch.zeros(()), ratio.log()]), torch.zeros(2)])
            said = type("Said", (), {"tokens": torch.tensor([1])})()
            verdict = judge(rule.trust(logits, said, 0))
            seen.add(bool(verdict.regenerate))
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


@pytest.mark.parametrize("prompt", [[], [3] * 250])
def test_transformers_refuses_in_our_words(prompt: list[int]) -> None:
    with pytest.raises(PromptError):
        TransformersDecoder(lively_case(0).verifier, frozenset()).generate(prompt, 20)
