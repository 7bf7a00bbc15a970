"""Whether prompts fit a verifier's context: all of them, before any is answered.

What a first turn takes is known. A later turn stands after answers that are not: it is refused where it would not fit
after empty ones. Where it fits after those, and might not after the longest, the conversation is begun, and ends
before the turn for which its answers have left no room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from viasd_calib.errors import PromptError
from viasd_calib.models import Verifier, context_length, encode_prompt, template_of
from viasd_calib.prompts import Prompt

SHOWN = 5
"""Prompts that an error or a notice names; it counts the others."""


@dataclass(frozen=True)
class LengthCheck:
    """What a look at all prompts came to.

    Attributes:
        checked: how many there were.
        refused: of each prompt that cannot be answered its id and why, in one sentence.
        may_end_early: ids of those whose later turns may find no room after long answers.
    """

    checked: int
    refused: list[tuple[str, str]]
    may_end_early: list[str]

    def raise_refused(self) -> None:
        """Refuse all that cannot be answered, together.

        Raises:
            PromptError: naming the first few.
        """
        if not self.refused:
            return
        reasons = [reason for _, reason in self.refused]
        if len(reasons) == 1:
            raise PromptError(reasons[0])
        lines = "\n  ".join(reasons[:SHOWN])
        rest = [repr(id_) for id_, _ in self.refused[SHOWN : 4 * SHOWN]]
        also = f"\n  and {len(reasons) - SHOWN} others: {', '.join(rest)}" if rest else ""
        more = ", ..." if len(reasons) > 4 * SHOWN else ""
        raise PromptError(f"{len(reasons)} of {self.checked} prompts cannot be answered:\n  {lines}{also}{more}")


def look_at_lengths(verifier: Verifier, prompts: Iterable[Prompt], max_new_tokens: int) -> LengthCheck:
    """Encode every turn of every prompt after empty answers.

    Args:
        max_new_tokens: longest answer to a turn.
    """
    context = context_length(verifier.model.config)
    refused: list[tuple[str, str]] = []
    may_end_early: list[str] = []
    checked = 0
    for prompt in prompts:
        checked += 1
        try:
            shortest = [len(_unanswered(verifier, prompt, turn, max_new_tokens)) for turn in range(len(prompt.turns))]
        except PromptError as error:
            refused.append((prompt.id, str(error)))
            continue
        if any(length + (turn + 1) * max_new_tokens > context for turn, length in enumerate(shortest) if turn):
            may_end_early.append(prompt.id)
    return LengthCheck(checked, refused, may_end_early)


def check_lengths(verifier: Verifier, prompts: Iterable[Prompt], max_new_tokens: int) -> LengthCheck:
    """The same, and refuse what cannot be answered.

    Raises:
        PromptError: prompts that do not fit the context, have no tokens or are refused by the chat template; the first
            few are named, all are counted.
    """
    found = look_at_lengths(verifier, prompts, max_new_tokens)
    found.raise_refused()
    return found


def encode_turn(verifier: Verifier, prompt: Prompt, answers: Sequence[str], room: int) -> list[int] | None:
    """Ids of a prompt's conversation up to its next answer; None where the earlier answers have left no room for that.

    Args:
        answers: the assistant's answers to the earlier turns.
        room: tokens that must still fit after the prompt.

    Raises:
        PromptError: it would not fit after empty answers either.
    """
    try:
        return encode_prompt(verifier, prompt, list(answers), room)
    except PromptError:
        if not answers:
            raise
        _unanswered(verifier, prompt, len(answers), room)
        return None


def unused_template_arguments(verifier: Verifier, prompts: Iterable[Prompt]) -> list[str]:
    """Names among the prompts' ``chat_template_kwargs`` that the verifier's chat template does not hold."""
    text = template_of(verifier.tokenizer) or ""
    return sorted({name for prompt in prompts for name in prompt.chat_template_kwargs if name not in text})


def _unanswered(verifier: Verifier, prompt: Prompt, turn: int, room: int) -> list[int]:
    return encode_prompt(verifier, prompt, [""] * turn, room)
