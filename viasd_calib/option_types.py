"""Types of options, with the ranges of numbers: what lies outside is refused, on the command line and in Python."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from viasd_calib.errors import UsageError, ViasdError

Count = Annotated[int, Field(ge=1)]
"""Of tokens, prompts, texts."""

OptionalCount = Annotated[int, Field(ge=0)]
"""The same, where 0 means none or all."""

Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""What torch takes as a seed."""

Share = Annotated[float, Field(gt=0, le=1)]
"""Of a mass or a cost; nothing is none."""

Inside = Annotated[float, Field(gt=0, lt=1)]
"""Strictly between 0 and 1."""

ShareOrNone = Annotated[float, Field(ge=0, le=1)]
"""A share that may be none."""

ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A share that may be none, but not all."""

Nonnegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

DraftLength = Annotated[int, Field(ge=0, le=64)]
BlockLength = Annotated[int, Field(ge=1, le=64)]
MaxPending = Annotated[int, Field(ge=0, le=256)]
"""As in :class:`viasd_calib.spec.Decoding`."""


def bytes_of(name: str, value: int | str) -> int:
    """A number of bytes as an option gives it.

    Args:
        name: of the option.

    Raises:
        UsageError: it is none.

    Example:
        >>> bytes_of("--memory", "300MB"), bytes_of("--memory", "2GiB"), bytes_of("--memory", 1000)
        (300000000, 2147483648, 1000)
    """
    try:
        found = int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        found = 0
    if found < 1:
        raise UsageError(f"{name} is {value!r}; give bytes, as 300MB, 2GiB or a whole number, at least 1")
    return found


NUMBERS = {int: "a whole number", float: "a number"}
WORDS = {bool: "true or false", str: "text", NoneType: "null"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def type_words(kind: Any) -> str:
    """What an option of a type takes.

    Example:
        >>> type_words(Count | None), type_words(Inside), type_words(Literal["a", "b"])
        ('a whole number, at least 1, or null', 'a number above 0 and below 1', 'one of a, b')
    """
    if kind in NUMBERS:
        return NUMBERS[kind]
    if kind in WORDS:
        return WORDS[kind]
    metadata = getattr(kind, "__metadata__", None)
    if metadata is not None:
        plain = type_words(kind.__origin__)
        return (plain.replace("a number", "a finite number") if _is_finite(metadata) else plain) + _bounds(metadata)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"an object with {', '.join(kind.model_fields)}"
    if of_objects(kind):
        return 'an object of objects, \'{"name": {"option": value}}\''
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "an object, '{\"name\": value}'"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Iterable) and arguments:
        return f"a list, '[..., ...]', each {type_words(arguments[0])}"
    if arguments:
        null_last = sorted(arguments, key=lambda one: one is NoneType)
        return ", or ".join(dict.fromkeys(type_words(one) for one in null_last))
    return getattr(kind, "__name__", str(kind))


def of_objects(kind: Any) -> bool:
    """Whether a type is of objects whose values are objects.

    Example:
        >>> of_objects(dict[str, dict[str, int]]), of_objects(dict[str, int])
        (True, False)
    """
    while (origin := get_origin(kind)) is Annotated:
        kind = get_args(kind)[0]
    if not (isinstance(origin, type) and issubclass(origin, Mapping)):
        return False
    inner = get_origin(get_args(kind)[1])
    return isinstance(inner, type) and issubclass(inner, Mapping)


def _constraints(metadata: Iterable[Any]) -> Iterator[Any]:
    """What pydantic's fields hold numbers to."""
    for entry in metadata:
        yield from getattr(entry, "metadata", [entry])


def _is_finite(metadata: Iterable[Any]) -> bool:
    return any(getattr(constraint, "allow_inf_nan", True) is False for constraint in _constraints(metadata))


def _bounds(metadata: Iterable[Any]) -> str:
    """The bounds of a number, after its name."""
    found: dict[str, Any] = {}
    for constraint in _constraints(metadata):
        found |= {name: getattr(constraint, name) for name in BOUNDS if hasattr(constraint, name)}
    bounds = " and ".join(f"{BOUNDS[name]} {_power(bound)}" for name, bound in found.items())
    if not bounds:
        return ""
    return f" {bounds}" if {"gt", "lt"} & {*found} else f", {bounds}"


def _power(bound: Any) -> str:
    return "2**64" if bound == 2**64 else f"{bound:g}" if isinstance(bound, float) else str(bound)


def check_options(options: Any, error: type[ViasdError] = UsageError) -> None:
    """Refuse an option of a dataclass whose value its annotation does not allow.

    Args:
        options: the dataclass; its annotations may have ranges (:data:`Count`).
        error: what is raised.

    Raises:
        ViasdError: of the type ``error``, naming the first such option with what it takes.
    """
    for name, kind in _annotations(type(options)).items():
        check_option(name, getattr(options, name), kind, error)


def check_option(name: str, value: object, kind: Any, error: type[ViasdError] = UsageError) -> None:
    """Refuse a value that a type does not allow; nothing is converted, so that ``"2"`` is no number.

    Raises:
        ViasdError: of the type ``error``.

    Example:
        >>> check_option("limit", 3, Count | None)
        >>> check_option("limit", 0, Count | None)
        Traceback (most recent call last):
        viasd_calib.errors.UsageError: limit is 0; give a whole number, at least 1, or null
    """
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(plain, Sequence) and not isinstance(plain, str | bytes):
        plain = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in plain]
    if not _allows(kind, plain):
        raise error(f"{name} is {value!r}; give {type_words(kind)}")


def _allows(kind: Any, value: object) -> bool:
    if isinstance(kind, type) and get_origin(kind) is None and kind not in (*NUMBERS, *WORDS):
        return isinstance(value, kind)
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


def _annotations(options: type[Any]) -> dict[str, Any]:
    """Annotations of a dataclass, by field."""
    hints = get_type_hints(options, include_extras=True)
    return {field.name: hints[field.name] for field in fields(options)}
