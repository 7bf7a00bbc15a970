"""Where a text ends before its limit: end-of-text tokens, stop strings, transformers' stopping criteria."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from viasd_calib.errors import PromptError

Cancelled = Callable[[], bool] | Event
"""Asked once a round whether to give a text up."""


@dataclass(frozen=True)
class Ending:
    """What ends a text.

    Attributes:
        eos_ids: tokens that do; they are looked for on the host alone.
        criteria: asked about the text up to each token, in turn, with scores None. Tokens may be taken back
            and asked about again, so a criterion must be a function of the text (or of the time).
    """

    eos_ids: frozenset[int] = frozenset()
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    def within(self, text: Tensor, values: Sequence[int]) -> int | None:
        """How many of a text's last tokens remain, up to the one that ends it; None where none of them does.

        Args:
            text: [length], long.
            values: its last tokens, on the host.

        Example:
            >>> Ending(frozenset({7})).within(torch.tensor([5, 6, 7, 8]), [6, 7, 8])
            2
        """
        eos = next((place + 1 for place, value in enumerate(values) if value in self.eos_ids), None)
        if not self.criteria or not values:
            return eos
        return self._met(text, len(values), eos or len(values)) or eos

    def _met(self, text: Tensor, new: int, asked: int) -> int | None:
        """The same by the criteria, for the first ``asked`` of the last ``new`` tokens."""
        ids: Any = text[None].clone()  # a criterion may keep what it is shown
        before = text.shape[0] - new
        met = [self.criteria(ids[:, : before + place + 1], None) for place in range(asked)]
        flags: list[bool] = torch.stack([flag.any() for flag in met]).tolist()
        return flags.index(True) + 1 if True in flags else None


class InNewText(StoppingCriteria):
    """A criterion that does not see the prompt.

    Args:
        criterion: what to ask.
        prompt_length: tokens to leave out.
    """

    def __init__(self, criterion: StoppingCriteria, prompt_length: int) -> None:
        self.criterion = criterion
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.criterion(input_ids[:, self.prompt_length :], scores, **kwargs)


def stop_string_criterion(
    tokenizer: PreTrainedTokenizerBase | None, stop_strings: str | Sequence[str]
) -> StopStringCriteria:
    """transformers' criterion that a text's last token completes one of some strings.

    Raises:
        PromptError: they are no strings, there is no tokenizer, a string is empty, or no token can complete one.
    """
    strings = _read_strings(stop_strings)
    if tokenizer is None:
        raise PromptError("stop strings need a tokenizer; give the decoder the verifier's")
    if "" in strings:
        raise PromptError("a stop string is empty; give it some text")
    try:
        return StopStringCriteria(tokenizer, strings)
    except ValueError as error:
        # It looks for some letters in what the tokenizer writes for them, to tell what each token adds.
        unknown = "substring not found" in str(error)
        reason = "what its tokens write cannot be told" if unknown else "none of its tokens ends one of them"
        raise PromptError(
            f"the tokenizer cannot write the stop strings {strings}: {reason}; give others, or leave them out"
        ) from error


def _read_strings(stop_strings: object) -> list[str]:
    given = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(given, Collection) or isinstance(given, bytes) or not all(isinstance(one, str) for one in given):
        raise PromptError(f"stop_strings is {stop_strings!r}; give a string or a list of strings")
    return list(given)


def is_cancelled(cancelled: Cancelled | None) -> bool:
    """Whether the caller has given a text up."""
    if cancelled is None:
        return False
    return cancelled.is_set() if isinstance(cancelled, Event) else cancelled()


def latched(cancelled: Cancelled | None) -> Callable[[], bool]:
    """The same question, to which yes stays yes.

    Example:
        >>> answers = iter([False, True, False])
        >>> ask = latched(lambda: next(answers))
        >>> [ask(), ask(), ask()]
        [False, True, True]
    """
    given_up = False

    def ask() -> bool:
        nonlocal given_up
        given_up = given_up or is_cancelled(cancelled)
        return given_up

    return ask
