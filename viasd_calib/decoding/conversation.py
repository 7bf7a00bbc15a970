"""Answering a prompt's turns one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from viasd_calib.decoding.session import Generation
from viasd_calib.models import Verifier
from viasd_calib.prompt_lengths import encode_turn
from viasd_calib.prompts import Prompt


@dataclass(frozen=True)
class Turn:
    """One answered turn: what the decoder was given, and what it wrote."""

    prompt_ids: list[int]
    generation: Generation


class Answering(Protocol):
    """Whatever answers a prompt; a :class:`~viasd_calib.decoding.decoder.Decoder` does."""

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
        """Decode one text."""
        ...


def converse(decoder: Answering, verifier: Verifier, prompt: Prompt, max_new_tokens: int) -> Iterator[Turn]:
    """Answer every turn of a prompt, each after the decoder's own earlier answers.

    It ends before a turn for which these answers have left no room in the verifier's context.

    Raises:
        PromptError: a turn would not fit after empty answers either.
    """
    answers: list[str] = []
    for _ in prompt.turns:
        ids = encode_turn(verifier, prompt, answers, max_new_tokens)
        if ids is None:
            return
        generation = decoder.generate(ids, max_new_tokens)
        answers.append(str(verifier.tokenizer.decode(generation.tokens, skip_special_tokens=True)))
        yield Turn(ids, generation)
