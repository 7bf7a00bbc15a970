"""Losses against the verifier's own choices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rounding import rounding
from tests.tiny import tiny_model, transformers_logits, transformers_text
from viasd_calib.calibration.judging import JudgedPrompt, count_diverged, judge, token_deficits
from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.choices import CERTIFICATE_LOSSES
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.conversation import Turn
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel

PROMPT = Prompt(id="a", turns=["w1"])
IDS = [3, 7, 1]


def test_the_verifiers_own_text_lies_nowhere_below_its_choice() -> None:
    model = tiny_model()
    text = transformers_text(model, IDS, 20, [])
    assert token_deficits(RoutedModel(model), IDS, text).tolist() == [0.0] * 20


def test_each_changed_token_lies_below_by_the_difference_of_logits() -> None:
    model = tiny_model()
    text = transformers_text(model, IDS, 12, [])
    text[5] = (text[5] + 1) % 24
    found = token_deficits(RoutedModel(model), IDS, text)
    logits = transformers_logits(model, [*IDS, *text])[len(IDS) - 1 : -1]
    wanted = logits.amax(-1) - logits[torch.arange(12), text]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * rounding(logits))
    assert found[:5].sum() == 0 < found[5]


def turn(tokens: list[int]) -> Turn:
    tiers = [Tier.ESCALATE] * len(tokens)
    return Turn(IDS, Generation(tokens, tiers, [False] * len(tokens), Counts()))


def test_divergence_is_a_share_of_the_tokens_of_all_turns() -> None:
    model = tiny_model()
    routed, own = RoutedModel(model), transformers_text(model, IDS, 6, [])
    changed = [*own[:-1], (own[-1] + 1) % 24]
    of_prompt = loss_named("token_divergence").of_prompt
    turns = [turn(own), turn(changed), turn(own)]
    assert of_prompt(judge(routed, PROMPT, turns[:1])) == 0
    assert of_prompt(judge(routed, PROMPT, turns)) == pytest.approx(1 / 18)
    assert count_diverged(routed, turns) == 1
    gap = float(judge(routed, PROMPT, turns).all_deficits.max())
    assert of_prompt(judge(routed, PROMPT, turns, gap)) == 0, "what rounding explains is no divergence"
    assert count_diverged(routed, turns, gap) == 0


def judged(*deficits: float, gap: float = 0.0) -> JudgedPrompt:
    """A prompt whose tokens lie so far below q's choice, two turns of them."""
    half = len(deficits) // 2
    return JudgedPrompt(PROMPT, [], [torch.tensor(deficits[:half]), torch.tensor(deficits[half:])], gap)


def test_what_losses_come_to() -> None:
    """Of four tokens one is a near tie, one a little worse, and one as much worse as counts."""
    of = {name: loss_named(name).of_prompt for name in CERTIFICATE_LOSSES}
    one = judged(0.0, 0.05, math.log(20), 9.0, gap=0.1)
    assert of["token_divergence"](one) == 0.5
    assert of["any_divergence"](one) == 1
    assert of["overshoot"](one) == pytest.approx((math.log(10) / math.log(100) + 1) / 4)
    assert of["overshoot_tail"](one) == 0.25
    own = judged(0.0, 0.1, 0.0, 0.0, gap=0.1)
    assert [of[name](own) for name in of] == [0.0] * len(of)


@given(deficits=st.lists(st.floats(0, 60, width=32), min_size=2, max_size=20), gap=st.floats(0, 3))
def test_every_loss_lies_between_0_and_1_and_falls_with_the_gap(deficits: list[float], gap: float) -> None:
    for name in CERTIFICATE_LOSSES:
        strict, within = (loss_named(name).of_prompt(judged(*deficits, gap=one)) for one in (0.0, gap))
        assert 0 <= within <= strict <= 1


@pytest.mark.parametrize("name", CERTIFICATE_LOSSES)
def test_each_module_is_a_loss_of_its_name(name: str) -> None:
    found = loss_named(name)
    assert found.of_prompt.__module__ == f"viasd_calib.calibration.losses.{name}"
    assert found.meaning
    assert found.claim


def test_a_name_of_an_earlier_release_is_known() -> None:
    assert loss_named("divergence") is loss_named("token_divergence")
