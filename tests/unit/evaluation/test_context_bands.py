"""Prompts in bands by their length, chat template included."""

from __future__ import annotations

import pytest

from viasd_calib.errors import PromptError
from viasd_calib.evaluation import context_bands as module
from viasd_calib.evaluation.context_bands import context_bands
from viasd_calib.models import Verifier
from viasd_calib.prompts import Prompt


def of_words(*counts: int) -> Prompt:
    return Prompt(id="a", turns=[" ".join(["w1"] * count) for count in counts])


def test_a_prompt_is_in_the_band_of_its_first_turn(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny template adds three tokens: 13 words are 16 of them."""
    monkeypatch.setattr(module, "SHORTEST_BAND", 16)
    prompts = [of_words(13), of_words(14), of_words(5, 100), of_words(80)]
    assert context_bands(tiny_verifier, prompts, 8) == [16, 32, 16, 128]


def test_a_prompt_that_does_not_fit_is_refused(tiny_verifier: Verifier) -> None:
    with pytest.raises(PromptError, match="exceeds the verifier's context"):
        context_bands(tiny_verifier, [of_words(300)], 8)
