"""Which prompts ask the same: copies of one text are one prompt, and what was learned from is not measured on.

Texts are compared as people would: in Unicode's form NFC, in small letters, and with each run of white space as one
space. A copy under another id, or with another line break, is a copy.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from viasd_calib.prompts import Prompt

SHORT = 16
"""Hexadecimal digits that files keep of a prompt's hash: enough to tell millions apart."""


def normalised(text: str) -> str:
    """A text as it is compared with others.

    Example:
        >>> normalised("Why  is\\nthe sky Blue? ")
        'why is the sky blue?'
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())


def normalised_sha256(prompt: Prompt) -> str:
    """Hash of what a prompt asks, normalised: of its turns, its system message and what was said before.

    Example:
        >>> one, other = Prompt(id="a", task="qa", turns=["Why?"]), Prompt(id="b", task="qa", turns=[" why?\\n"])
        >>> normalised_sha256(one) == normalised_sha256(other), one.sha256 == other.sha256
        (True, False)
    """
    said = prompt.model_dump(include={"turns", "system", "messages"})
    given = {name: _normalised_all(value) for name, value in said.items() if value}
    return hashlib.sha256(json.dumps(given, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _normalised_all(value: Any) -> Any:
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, dict):
        return {name: _normalised_all(inner) for name, inner in value.items()}
    return [_normalised_all(inner) for inner in value]


def without_copies(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts, the first of each text alone.

    Example:
        >>> same = [Prompt(id=name, task="qa", turns=["Why?"]) for name in "abc"]
        >>> [prompt.id for prompt in without_copies(same)]
        ['a']
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(normalised_sha256(prompt), prompt)
    return list(first.values())


def short_hashes(texts: Iterable[str]) -> list[str]:
    """The beginnings of hashes, each once, rising: what files keep of the prompts after them."""
    return sorted({digest[:SHORT] for digest in texts})


def is_known(prompt: Prompt, known: Collection[str]) -> bool:
    """Whether a prompt's text is among those whose short hashes are ``known``.

    Traces of earlier releases hold the hashes of texts as they were written, so that is looked for too.
    """
    return normalised_sha256(prompt)[:SHORT] in known or prompt.sha256[:SHORT] in known


def known_prompts(prompts: Iterable[Prompt], known: Collection[str]) -> Sequence[Prompt]:
    """Those of the prompts that are known."""
    return [prompt for prompt in prompts if is_known(prompt, known)]
