"""Losses against the verifier's own choices."""

from __future__ import annotations

import torch

from tests.tiny import tiny_model, transformers_text
from viasd_calib.calibration.losses import diverging
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
