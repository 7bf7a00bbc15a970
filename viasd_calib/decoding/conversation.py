"""Answering a prompt's turns one after the other, for one prompt or for those of a batch together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class AnsweringTogether(Protocol):
    """Whatever answers several prompts together; a decoder does."""

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, batch_size: int = 8
    ) -> list[Generation]:
        """Decode texts, at most ``batch_size`` at a time; in the order of their prompts."""
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


def converse_together(
    decoder: AnsweringTogether, verifier: Verifier, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[Turn]]:
    """Answer prompts as one batch, turn by turn: all their first turns together, then all their second ones, and so on.

    A conversation that has no further turn, or no room for it (as in :func:`converse`), leaves the batch.

    Returns:
        The turns of each prompt, in their order.

    Raises:
        PromptError: a turn would not fit after empty answers either.
    """
    turns: list[list[Turn]] = [[] for _ in prompts]
    answers: list[list[str]] = [[] for _ in prompts]
    for number in range(max((len(prompt.turns) for prompt in prompts), default=0)):
        asked: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            if len(turns[place]) == number < len(prompt.turns):
                ids = encode_turn(verifier, prompt, answers[place], max_new_tokens)
                if ids is not None:
                    asked[place] = ids
        if not asked:
            break
        generations = decoder.generate_batch([*asked.values()], max_new_tokens, batch_size=len(asked))
        for (place, ids), generation in zip(asked.items(), generations, strict=True):
            answers[place].append(str(verifier.tokenizer.decode(generation.tokens, skip_special_tokens=True)))
            turns[place].append(Turn(ids, generation))
    return turns


def answer_batch(
    decoder: Answering, verifier: Verifier, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> list[list[Turn]]:
    """Answer the prompts of one batch: together, or one by one where ``batch_size`` is 1.

    A batch of more that has one prompt left is answered as a batch, too.

    Args:
        decoder: :class:`AnsweringTogether` where ``batch_size`` is not 1.
        batch_size: most prompts of a batch.

    Returns:
        The turns of each prompt, in their order.

    Raises:
        PromptError: a turn would not fit after empty answers either.
    """
    if batch_size == 1:
        return [list(converse(decoder, verifier, prompt, max_new_tokens)) for prompt in prompts]
    assert isinstance(decoder, AnsweringTogether), f"{type(decoder).__name__} answers no batches"
    return converse_together(decoder, verifier, prompts, max_new_tokens)
