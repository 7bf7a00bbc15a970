"""Reading what callers give as token ids and counts: what is clearly meant is taken, the rest refused by name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from viasd_calib.errors import PromptError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TokenIds: TypeAlias = "Sequence[int] | Tensor | np.ndarray[Any, Any]"
"""Token ids of one text: integers in a sequence, or in a tensor or array of shape [length] or [1, length]."""


def read_token_ids(prompt: TokenIds, vocab_size: int, name: str = "the prompt") -> list[int]:
    """The ids of one text as plain integers.

    Args:
        prompt: a list, tuple or range of integers (Python's, numpy's or scalar tensors), or a tensor or array of
            integers; with one row around it, as ``return_tensors="pt"`` gives, it is the same text.
        vocab_size: ids run from 0 to one below it.
        name: what a message calls the text.

    Raises:
        PromptError: not the ids of one text, none at all, or one that the verifier does not have; it is named.

    Example:
        >>> read_token_ids(range(3), 10), read_token_ids([[4, 5]], 10)
        ([0, 1, 2], [4, 5])
        >>> read_token_ids([4, 10], 10)
        Traceback (most recent call last):
        viasd_calib.errors.PromptError: the prompt has the id 10 at place 1, but the verifier's ids run from 0 to 9; ...
    """
    ids = [_read_id(item, place, name) for place, item in enumerate(_one_row(prompt, name))]
    if not ids:
        raise PromptError(f"{name} is empty; give at least one token")
    check_token_ids(ids, vocab_size, name)
    return ids


def read_batch(prompts: Sequence[TokenIds] | Tensor, vocab_size: int) -> list[list[int]]:
    """The ids of several texts; a tensor or array of shape [texts, length] counts as its rows.

    Raises:
        PromptError: not a sequence of texts, or one of them cannot be read; its number is named.
    """
    rows = _plain(prompts)
    if not _is_sequence(rows):
        raise PromptError(f"the prompts are {shown(prompts)}; give a list with the token ids of each")
    return [read_token_ids(row, vocab_size, f"prompt {number} of the batch") for number, row in enumerate(rows)]


def check_token_ids(ids: Iterable[int], vocab_size: int, name: str) -> None:
    """Refuse ids that the verifier does not have.

    Raises:
        PromptError: naming the first of them and its place.
    """
    for place, value in enumerate(ids):
        if not 0 <= value < vocab_size:
            raise PromptError(
                f"{name} has the id {value} at place {place}, but the verifier's ids run from 0 to {vocab_size - 1}; "
                "encode it with the verifier's own tokenizer, without tokens added to it"
            )


def read_count(value: object, name: str, least: int = 1) -> int:
    """A whole number of at least ``least``.

    Raises:
        PromptError: any other number, or no whole number; booleans are none.

    Example:
        >>> read_count(3, "max_new_tokens")
        3
        >>> read_count(2.0, "max_new_tokens")
        Traceback (most recent call last):
        viasd_calib.errors.PromptError: max_new_tokens is 2.0 (float); give a whole number, 1 or more
    """
    number = whole_number(value)
    if number is None:
        raise PromptError(f"{name} is {shown(value)}; give a whole number, {least} or more")
    if number < least:
        raise PromptError(f"{name} is {number}; give a whole number, {least} or more")
    return number


def whole_number(value: object) -> int | None:
    """Any integer type's value as a plain integer; None for what is no integer, booleans among it.

    Example:
        >>> whole_number(7), whole_number(7.0), whole_number(True)
        (7, None, None)
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not hasattr(plain, "__index__"):
        return None
    return operator.index(plain)


def _read_id(item: object, place: int, name: str) -> int:
    number = whole_number(item)
    if number is None:
        raise PromptError(f"{name} has {shown(item)} at place {place}; token ids are whole numbers")
    return number


def _one_row(prompt: TokenIds, name: str) -> Sequence[Any]:
    """The items of a text, without the one row that may be around them."""
    row = _plain(prompt)
    if isinstance(row, Mapping):
        raise PromptError(f"{name} is {shown(prompt)}; give its input_ids alone")
    if not _is_sequence(row):
        raise PromptError(
            f"{name} is {shown(prompt)}; give a list of token ids, as engine.verifier.encode_chat(messages) or "
            "engine.verifier.tokenizer(text).input_ids returns"
        )
    inner = [_plain(item) for item in row] if len(row) else []
    if inner and all(_is_sequence(item) for item in inner):
        if len(inner) > 1:
            raise PromptError(f"{name} holds {len(inner)} texts; give one, or all of them to generate_batch")
        return list(inner[0])
    return list(row)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _plain(value: Any) -> Any:
    """Tensors and arrays, of any library, as lists or scalars; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def shown(value: object) -> str:
    """A value in a message: its beginning and its type."""
    kind = type(value).__name__
    if not isinstance(value, str | bytes | int | float | complex | None):
        return f"a value of type {kind}"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({kind})"
