"""The text of tokens that come one by one: together, the pieces are what decoding all at once gives.

What a token adds cannot be told from the token alone. A character may take several byte tokens; SentencePiece's byte
fallback turns a whole run of byte tokens into replacement characters when one of them breaks it; a leading space is
stripped from the whole text; cleaning up moves spaces. So the text is decoded from its beginning, and of its end as
much is held back as later tokens could still change. ``tokenizers.decoders.DecodeStream`` does not hold back enough:
it gives out the first character of a byte run that breaks later, and never what a text cut inside of a character
ends with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What an incomplete character decodes to."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of SentencePiece's byte fallback."""

CLEANED = 19
"""How many characters after a place decide what cleaning up spaces makes of it: transformers replaces ten patterns in
turn, and each looks one character less than its length ahead."""

SETTLED = frozenset({"ByteLevel", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "Strip", "Replace", "Fuse"})
"""Decoders of ``tokenizers`` whose text goes on after what was decoded, but for a broken character at its end."""

CONFIRMED = 8
"""Tokens that must leave a piece of text as it is, where nothing is known of how a tokenizer decodes."""


class TextStream:
    """Decodes tokens one by one.

    Args:
        tokenizer: of transformers, of any kind.
        skip_special_tokens: as for ``tokenizer.decode``.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.BPE({"h": 0, "Ã": 1, "©": 2}, []))
        >>> backend.decoder = decoders.ByteLevel()
        >>> stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=backend))
        >>> [stream.push(token) for token in (0, 1, 2)], stream.finish()
        (['h', '', 'é'], '')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens: list[int] = []
        self._told = 0  # characters given out
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._known = decodes_in_order(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._skipped = {*tokenizer.all_special_ids, *(token for token, what in added if what.special)}
        self._recent: list[str] = []  # texts after the last tokens, where the tokenizer is not known

    def push(self, token: int) -> str:
        """The text that a token settles; empty where all of it may still change."""
        self._tokens.append(token)
        if self._leaves_a_run_open(token):
            return ""
        text = self._decode()
        settled = len(text.rstrip(REPLACEMENT))
        if self._cleans:
            settled -= CLEANED
        if not self._known:
            settled = min(settled, self._confirmed(text))
        return self._tell(text, settled)

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        text = self._decode()
        return self._tell(text, len(text))

    def _tell(self, text: str, until: int) -> str:
        begin, self._told = self._told, max(self._told, until)
        return text[begin : self._told]

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip))

    def _leaves_a_run_open(self, token: int) -> bool:
        """Whether a run of byte tokens may go on after a token: it is one, or is skipped or unknown."""
        if token in self._skipped:
            return True
        name: Any = self._tokenizer.convert_ids_to_tokens(token)
        return name is None or BYTE_TOKEN.fullmatch(name) is not None

    def _confirmed(self, text: str) -> int:
        """How many leading characters the last tokens have left as they were."""
        self._recent = [*self._recent[-CONFIRMED:], text]
        return common_length(self._recent) if len(self._recent) > CONFIRMED else 0


def common_length(texts: Sequence[str]) -> int:
    """Leading characters that all texts share.

    Example:
        >>> common_length(["abc", "abd", "ab"])
        2
    """
    columns = enumerate(zip(*texts, strict=False))
    return next((place for place, column in columns if len(set(column)) > 1), min(map(len, texts)))


def decodes_in_order(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's decoder is one whose text later tokens only go on.

    Of its end they may change an incomplete character, a run of byte tokens, and, where a tokenizer cleans up spaces,
    :data:`CLEANED` characters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    if backend.decoder is None:
        return True  # tokens are joined with spaces
    try:
        decoder = json.loads(backend.decoder.__getstate__())
    except Exception:  # tokenizers raises no narrower one for a decoder that is written in Python
        return False
    fused = False  # after Fuse the whole text is one token
    for step in _steps(decoder):
        if step["type"] == "Replace" and fused and len(step["pattern"].get("String", "")) != 1:
            return False
        if step["type"] not in SETTLED:
            return False
        fused = fused or step["type"] == "Fuse"
    return True


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's steps, those of sequences within sequences in their order."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]
