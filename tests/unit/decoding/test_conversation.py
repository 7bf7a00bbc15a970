"""Answering turns: each is asked after the decoder's own earlier answers."""

from __future__ import annotations

import pytest

from viasd_calib.decoding.conversation import converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.errors import PromptError
from viasd_calib.models import Verifier
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel


@pytest.fixture
def decoder(tiny_verifier: Verifier) -> Decoder:
    return Decoder(RoutedModel(tiny_verifier.model), None, Autoregressive(), tiny_verifier.eos_ids)


def test_each_turn_follows_the_answers_before_it(decoder: Decoder, tiny_verifier: Verifier) -> None:
    prompt = Prompt(id="three", task="chat", turns=["w1 w2", "w3", "w4 w5"])
    turns = list(converse(decoder, tiny_verifier, prompt, 6))
    messages: list[dict[str, str]] = []
    for question, turn in zip(prompt.turns, turns, strict=True):
        messages.append({"role": "user", "content": question})
        assert turn.prompt_ids == tiny_verifier.encode_chat(messages)
        assert turn.generation.tokens == decoder.generate(turn.prompt_ids, 6).tokens
        answer = tiny_verifier.tokenizer.decode(turn.generation.tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": str(answer)})


def test_turns_are_answered_as_they_are_asked_for(decoder: Decoder, tiny_verifier: Verifier) -> None:
    """A prompt whose second turn does not fit has its first answered; the error names the prompt."""
    long = " ".join(["w1"] * tiny_verifier.model.config.max_position_embeddings)
    turns = converse(decoder, tiny_verifier, Prompt(id="long", task="chat", turns=["w1", long]), 4)
    assert 0 < len(next(turns).generation.tokens) <= 4
    with pytest.raises(PromptError, match="long"):
        next(turns)
