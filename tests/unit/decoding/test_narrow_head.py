"""A q' that cannot say every token, under each method: q says the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from tests.cases import Case, lively_case
from tests.tiny import VOCAB, constant_gate
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.slim_rules.calibrated import CalibratedRule
from viasd_calib.decoding.slim_rules.margin import MarginRule
from viasd_calib.decoding.slim_rules.ratio import RatioRule
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.multi_level import MultiLevel
from viasd_calib.decoding.strategies.self_speculative import SelfSpeculative
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.decoding.strategies.trispec import TriSpec
from viasd_calib.decoding.strategies.via_sd_fixed import ViaSDFixed
from viasd_calib.decoding.strategies.via_sd_published import ViaSDPublished

RULES: dict[str, SlimRule] = {
    "calibrated": CalibratedRule(Gate(constant_gate("slim_margin", 9.0)), 0.5, 0.5),
    "ratio": RatioRule(0.7, 0.5),
    "margin": MarginRule(0.3),
}
STRICT: dict[str, Strategy] = {
    "autoregressive": Autoregressive(),
    "speculative": Speculative(4),
    "self_speculative": SelfSpeculative(4),
    "multi_level": MultiLevel(draft_length=4),
    **{f"three_tier, {name}": ThreeTier(rule, draft_length=4) for name, rule in RULES.items()},
}


def narrow_case(seed: int) -> Case:
    """A q' without some of the tokens that q wants, and a text long enough to want them."""
    case = lively_case(seed)
    wanted = [token for token, _ in Counter(case.expected).most_common()]
    missing = set(wanted[::2])
    return replace(case, head_ids=[token for token in range(VOCAB) if token not in missing])


@pytest.mark.parametrize("name", STRICT)
def test_a_strict_text_holds_what_the_slim_verifier_cannot_say(name: str) -> None:
    tiers: Counter[Tier] = Counter()
    slim_passes = 0
    for seed in range(6):
        case = narrow_case(seed)
        assert set(case.expected) - set(case.head_ids or [])
        out = case.generate(STRICT[name])
        assert out.tokens == case.expected
        tiers.update(out.tiers)
        slim_passes += out.counts.slim_passes
    if name.startswith("three_tier"):
        assert tiers[Tier.ACCEPT] + tiers[Tier.REGENERATE] > 0
    assert (slim_passes > 0) == (name not in ("autoregressive", "speculative"))


@pytest.mark.parametrize(
    "method",
    [
        TriSpec(draft_length=4, max_pending=12),
        ViaSDFixed(draft_length=4, max_pending=12),
        ViaSDPublished(draft_length=4, max_pending=12),
    ],
    ids=str,
)
def test_what_the_slim_tier_decides_it_can_say(method: Strategy) -> None:
    """The lossy baselines: a drafted token that q' cannot say is never accepted by it."""
    decided = 0
    for seed in range(6):
        case = narrow_case(seed)
        out = case.generate(method)
        by_slim = [token for token, tier in zip(out.tokens, out.tiers, strict=True) if tier is not Tier.ESCALATE]
        assert set(by_slim) <= set(case.head_ids or [])
        decided += len(by_slim)
    assert decided


class Only(LogitsProcessor):
    """Allows some tokens alone."""

    stateless = True

    def __init__(self, allowed: set[int]) -> None:
        self.forbidden = torch.tensor([token for token in range(VOCAB) if token not in allowed])

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.index_fill(-1, self.forbidden, -torch.inf)


def constrained(case: Case, method: Strategy, allowed: set[int], sampling: Sampling) -> Generation:
    decoder = Decoder(case.verifier, case.drafter, method, case.eos, sampling, [Only(allowed)])
    return decoder.generate(case.prompt, case.count)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", [RULES["calibrated"], RULES["margin"]], ids=["calibrated", "margin"])
def test_where_all_that_it_can_say_is_forbidden_it_decides_nothing(rule: SlimRule, temperature: float) -> None:
    """Not even without an audit: a row without a possible token is q's to decide."""
    case = replace(lively_case(1), head_ids=[0, 1, 2, 3])
    method = ThreeTier(rule, draft_length=4, audit="off")
    out = constrained(case, method, {10, 11, 12, 13, 14}, Sampling(temperature=temperature))
    assert out.counts.slim_passes > 0
    assert set(out.tokens) <= {10, 11, 12, 13, 14}
    assert Tier.REGENERATE not in out.tiers


def test_a_constrained_strict_text_is_the_verifiers_own() -> None:
    case = replace(lively_case(2), head_ids=[0, 1, 2, 3, 10])
    allowed = {3, 10, 11, 12, 13}
    expected = constrained(case, Autoregressive(), allowed, Sampling()).tokens
    for method in (STRICT["three_tier, calibrated"], STRICT["self_speculative"], STRICT["three_tier, ratio"]):
        assert constrained(case, method, allowed, Sampling()).tokens == expected


def test_texts_of_a_batch_share_the_reduced_head() -> None:
    case = narrow_case(3)
    prompts = [case.prompt, [5], [9, 1, 4, 4, 8]]
    decoder = case.decoder(STRICT["three_tier, calibrated"])
    together = decoder.generate_batch(prompts, case.count)
    assert together == [decoder.generate(prompt, case.count) for prompt in prompts]
    assert sum(text.counts.slim_passes for text in together) > 0
