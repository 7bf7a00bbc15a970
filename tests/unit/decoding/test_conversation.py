"""Answering turns: each is asked after the decoder's own earlier answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.tiny import tiny_prompts
from viasd_calib.decoding.conversation import answer_batch, converse, converse_together
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.session import Generation
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


class AloneOnly:
    """A decoder that answers no batches."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
        return self.decoder.generate([*prompt], max_new_tokens)


class Counted(AloneOnly):
    """A decoder that notes how many texts it is asked for together."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.sizes: list[int] = []

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, batch_size: int = 8
    ) -> list[Generation]:
        self.sizes.append(len(prompts))
        assert batch_size >= len(prompts)
        return self.decoder.generate_batch([[*one] for one in prompts], max_new_tokens, batch_size=batch_size)


def test_the_turns_of_a_batch_are_those_of_each_conversation(decoder: Decoder, tiny_verifier: Verifier) -> None:
    """Conversations advance together, and those of fewer turns leave."""
    prompts = tiny_prompts(5, turns=3)
    lengths = [len(prompt.turns) for prompt in prompts]
    assert {*lengths} == {1, 2, 3}
    counted = Counted(decoder)
    together = converse_together(counted, tiny_verifier, prompts, 6)
    assert together == [list(converse(decoder, tiny_verifier, prompt, 6)) for prompt in prompts]
    assert counted.sizes == [sum(length > turn for length in lengths) for turn in range(3)]
    assert converse_together(counted, tiny_verifier, [], 6) == []


def test_a_batch_is_answered_together_and_one_prompt_at_a_time_by_whatever_answers(
    decoder: Decoder, tiny_verifier: Verifier
) -> None:
    """A batch of more that has one prompt left is a batch, too."""
    prompts, counted = tiny_prompts(3, turns=2), Counted(decoder)
    single = answer_batch(AloneOnly(decoder), tiny_verifier, prompts, 6, 1)
    assert single == [list(converse(decoder, tiny_verifier, prompt, 6)) for prompt in prompts]
    assert answer_batch(counted, tiny_verifier, prompts, 6, 3) == single
    assert counted.sizes[0] == 3
    assert answer_batch(counted, tiny_verifier, prompts[:1], 6, 3) == single[:1]
    with pytest.raises(AssertionError, match="AloneOnly answers no batches"):
        answer_batch(AloneOnly(decoder), tiny_verifier, prompts, 6, 3)


def test_a_conversation_without_room_leaves_the_batch(decoder: Decoder, tiny_verifier: Verifier) -> None:
    """Its second turn would fit after an empty answer, not after the one that it got; the other goes on."""
    lengths = range(1, tiny_verifier.model.config.max_position_embeddings)
    prompts = (Prompt(id="full", task="chat", turns=["w1", " ".join(["w2"] * count), "w3"]) for count in lengths)
    short = Prompt(id="short", task="chat", turns=["w1", "w2", "w3"])
    first = next(one for one in prompts if _turns(decoder, tiny_verifier, one) == 1)
    ended, went_on = converse_together(Counted(decoder), tiny_verifier, [first, short], 4)
    assert (len(ended), len(went_on)) == (1, 3)
    assert went_on == list(converse(decoder, tiny_verifier, short, 4))


def _turns(decoder: Decoder, verifier: Verifier, prompt: Prompt) -> int | None:
    """How many turns are answered; None where the prompt is refused."""
    try:
        return len(list(converse(decoder, verifier, prompt, 4)))
    except PromptError:
        return None
