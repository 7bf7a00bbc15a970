"""Losses against the verifier's own choices."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model, transformers_text
from viasd_calib.calibration.losses.base import loss_named
from viasd_calib.calibration.losses.divergence import diverging
from viasd_calib.choices import CERTIFICATE_LOSSES
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.conversation import Turn
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.slim.forward import RoutedModel


def test_the_verifiers_own_text_does_not_stray() -> None:
    model = tiny_model()
    prompt = [3, 7, 1]
    text = transformers_text(model, prompt, 20, [])
    assert not diverging(RoutedModel(model), prompt, text).any()


def test_each_changed_token_is_found() -> None:
    model = tiny_model()
    prompt = [3, 7, 1]
    text = transformers_text(model, prompt, 12, [])
    text[5] = (text[5] + 1) % 24
    diverged = diverging(RoutedModel(model), prompt, text)
    assert diverged[:5].sum() == 0
    assert diverged[5]
    again = torch.tensor(transformers_text(model, [*prompt, *text[:8]], 1, []))
    assert bool(diverged[8]) == bool(again[0] != text[8])


def turn(prompt: list[int], tokens: list[int]) -> Turn:
    tiers = [Tier.ESCALATE] * len(tokens)
    return Turn(prompt, Generation(tokens, tiers, [False] * len(tokens), Counts()))


def test_divergence_is_a_share_of_the_tokens_of_all_turns() -> None:
    model = tiny_model()
    routed, prompt = RoutedModel(model), [3, 7, 1]
    own = transformers_text(model, prompt, 6, [])
    changed = [*own[:-1], (own[-1] + 1) % 24]
    of_prompt = loss_named("divergence").of_prompt
    assert of_prompt(routed, [turn(prompt, own)]) == 0
    assert of_prompt(routed, [turn(prompt, own), turn(prompt, changed), turn(prompt, own)]) == 1 / 18


@pytest.mark.parametrize("name", CERTIFICATE_LOSSES)
def test_each_module_is_a_loss_of_its_name(name: str) -> None:
    found = loss_named(name)
    assert found.of_prompt.__module__ == f"viasd_calib.calibration.losses.{name}"
    assert found.meaning
    assert found.claim
