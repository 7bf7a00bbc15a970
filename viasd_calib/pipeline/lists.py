"""Names and numbers as options take them and as tables print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from viasd_calib.errors import ViasdError

Name = TypeVar("Name", bound=str)


def parse_methods(words: str | Sequence[str], methods: Iterable[Name], error: type[ViasdError]) -> list[Name]:
    """Methods from a list, or from words between commas, each once.

    Args:
        methods: those there are.
        error: what is raised.

    Raises:
        ViasdError: of the type ``error``, for a method that does not exist; the ones that do are named.

    Example:
        >>> parse_methods("b, a,b", ["a", "b", "c"], ViasdError)
        ['b', 'a']
    """
    known = {str(name): name for name in methods}
    names = split_names(words if isinstance(words, str) else ",".join(words))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise error(f"there is no method {unknown[0] if unknown else ''!r}; choose from {', '.join(known)}")
    return [known[name] for name in names]


def parse_counts(option: str, words: int | str | Sequence[int], error: type[ViasdError]) -> list[int]:
    """Whole numbers of an option, from one, a list or words between commas: each once, rising.

    Args:
        option: its name, as it is shown.
        error: what is raised.

    Raises:
        ViasdError: of the type ``error``, for anything but whole numbers of at least 1.

    Example:
        >>> parse_counts("--batch", "16, 1,4,4", ViasdError), parse_counts("--batch", 2, ViasdError)
        ([1, 4, 16], [2])
    """
    given = [words] if isinstance(words, int) else words
    names = split_names(given.strip("[] ")) if isinstance(given, str) else [str(one) for one in given]
    if not names or any(not (name.isascii() and name.isdigit()) or int(name) < 1 for name in names):
        raise error(f"{option} is {words!r}; give whole numbers, at least 1, as 1,4,16")
    return sorted({int(name) for name in names})


def split_names(words: str) -> list[str]:
    """The words between commas, each once.

    Example:
        >>> split_names("runs/a, runs/b,")
        ['runs/a', 'runs/b']
    """
    return list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))


def runs(places: Sequence[int]) -> str:
    """Rising numbers, with runs of them written as one.

    Example:
        >>> runs([3, 4, 5, 7]), runs([])
        ('3-5, 7', 'none')
    """
    begins = [place for place in places if place - 1 not in places]
    ends = [place for place in places if place + 1 not in places]
    words = (str(begin) if begin == end else f"{begin}-{end}" for begin, end in zip(begins, ends, strict=True))
    return ", ".join(words) or "none"


def dashed(name: str) -> str:
    """An option as it is shown: ``max_new_tokens`` or ``--max_new_tokens`` as ``--max-new-tokens``.

    Example:
        >>> dashed("capture_step.max_new_tokens")
        '--capture-step.max-new-tokens'
    """
    return "--" + name.removeprefix("--").replace("_", "-")
