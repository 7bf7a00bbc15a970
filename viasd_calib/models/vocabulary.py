"""Whether two tokenizers give their ids to the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Every token, special and added ones too, by its id.

    A converter to GGUF names the rows that pad a matrix ``[PAD7]``, by their ids: these stand for nothing.
    """
    words: dict[str, int] = tokenizer.get_vocab()
    return {number: word for word, number in words.items() if word != f"[PAD{number}]"}


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> tuple[int, str, str] | None:
    """The first id that is not the same token in both; None where the two agree.

    Returns:
        The id, and what it is in each, as words.
    """
    mine, theirs = tokens_by_id(one), tokens_by_id(other)
    if mine == theirs:
        return None
    number = min(number for number in mine.keys() | theirs.keys() if mine.get(number) != theirs.get(number))
    return number, _words(mine.get(number)), _words(theirs.get(number))


def _words(token: str | None) -> str:
    return "no token" if token is None else repr(token)
