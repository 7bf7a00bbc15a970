"""What the benchmark makes ready before its clock runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.tiny import tiny_prompts
from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.evaluation.bench import text_lengths
from viasd_calib.models import Verifier
from viasd_calib.slim.forward import RoutedModel

TOKENS = 7


def test_every_text_of_a_run_is_expected(tiny_verifier: Verifier) -> None:
    prompts = tiny_prompts(6, turns=3)
    assert max(len(prompt.turns) for prompt in prompts) > 1
    engine: Any = SimpleNamespace(verifier=tiny_verifier)
    expected = text_lengths(engine, prompts, TOKENS)
    decoder = Decoder(RoutedModel(tiny_verifier.model), None, Autoregressive())
    taken = {
        len(turn.prompt_ids) + TOKENS for prompt in prompts for turn in converse(decoder, tiny_verifier, prompt, TOKENS)
    }
    assert taken <= expected
    assert len(expected) < 3 * len(prompts) * 3 * TOKENS
