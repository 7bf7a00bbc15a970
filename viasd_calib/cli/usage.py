"""What is wrong with the words of a command, in one line: the option, what it was given, what it takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import PurePath
from typing import Annotated, Any, get_args

from pydantic import BaseModel

from viasd_calib.option_types import of_objects, type_words
from viasd_calib.pipeline.lists import dashed


def readable(
    message: str, kinds: Mapping[str, Any], words: Sequence[str] = (), positional: Collection[str] = ()
) -> str:
    """One line in place of what jsonargparse and argparse say.

    Args:
        message: theirs.
        kinds: types of the options, by name.
        words: those that were given.
        positional: those of the options that are given without their names.
    """
    message = message.strip()
    for pattern, say in (
        (r"unrecognized arguments: (.*)", lambda found: _unknown(found[1].split()[0], kinds, words, positional)),
        (r"the following arguments are required: (.*)", lambda found: _missing(found[1].split(", "), positional)),
        (r"Key \"([\w.]+)\" is required", lambda found: _missing([found[1]], positional)),
        (r"argument (\S+?)(?:/\S+)?: expected one argument", lambda found: f"{dashed(found[1])} needs a value"),
        (r"Parser key \"(?:config|cfg)\": File does not exist: '?(.*?)'?$", _no_configuration),
        (r"Problems parsing config:? ?(.*)", lambda found: _no_yaml(found[1], words)),
        (r"(?:Parser key \"(\w+)\":\s*)?Option '([\w.-]+)' is not accepted", lambda found: _entry(found, kinds)),
        (r"Parser key \"([\w.]+)\":?", lambda found: _value(found[1], message, kinds)),
    ):
        found = re.match(pattern, message, re.DOTALL)
        if found:
            return say(found)
    return "; ".join(reasons(message)) or " ".join(message.split())


BY_ENDING = {".json": "spec", ".jsonl": "prompts"}
"""Options whose value is given without their names by mistake, by what it ends with."""


def _no_configuration(found: re.Match[str]) -> str:
    return f"there is no configuration {found[1]}; give --config the path of a YAML file"


def _no_yaml(problem: str, words: Sequence[str]) -> str:
    named = values_of("--config", words)
    where = f" {named[-1]}" if named else ""
    return f"the configuration{where} is no valid YAML: {' '.join(problem.split())}; mend that line"


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """Every value that ``words`` give an option.

    Example:
        >>> values_of("--out", ["--out", "a", "--limit=3", "--out=b"])
        ['a', 'b']
    """
    spaced = [after for word, after in pairwise(words) if word == option]
    return spaced + [word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")]


def names_given(words: Sequence[str]) -> list[str]:
    """Names of the options that ``words`` give.

    Example:
        >>> names_given(["--out", "a", "--limit=3", "b"])
        ['out', 'limit']
    """
    return [_name_of(word) for word in words if word.startswith("--")]


def _name_of(word: str) -> str:
    """The name in ``--name`` or ``--name=value``."""
    return word.partition("=")[0].lstrip("-")


def _unknown(word: str, kinds: Mapping[str, Any], words: Sequence[str], positional: Collection[str]) -> str:
    """What is wrong with a word that belongs to no option.

    Args:
        words: all that were given.
        positional: options that are given without their names.
    """
    if not word.startswith("-"):
        meant = BY_ENDING.get(PurePath(word).suffix)
        if meant in kinds and meant not in (*names_given(words), *positional):
            return f"{word!r} stands after no option; write --{meant} {word}"
        return f"{word!r} stands after no option; give each value after its option's name, quoted if it has spaces"
    name = _name_of(word)
    if name in positional:
        return f"{name} is given without its name; write {name.upper()} in place of --{name} {name.upper()}"
    return f"there is no option {dashed(name)}{suggestion(name, kinds, '--')}"


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What else may have been meant, if anything is close; else nothing.

    Example:
        >>> suggestion("calibrte", ["capture", "calibrate"])
        '; did you mean calibrate?'
    """
    close = get_close_matches(name.replace("-", "_"), [one.replace("-", "_") for one in known], n=1, cutoff=0.6)
    if not close:
        return ""
    return f"; did you mean {prefix}{close[0].replace('_', '-')}?"


def _missing(names: Iterable[str], positional: Collection[str]) -> str:
    listed = [name if name in positional else dashed(name) for name in names]
    said = "is missing; give it" if len(listed) == 1 else "are missing; give them"
    return f"{' and '.join(listed)} {said}"


def _entry(found: re.Match[str], kinds: Mapping[str, Any]) -> str:
    inside, name = found[1], found[2]
    if inside is None:
        return f"the configuration has an entry {name!r}, which is no option of this command{suggestion(name, kinds)}"
    return f"{dashed(inside)} has no entry {name!r}; it takes {type_words(kinds.get(inside))}"


def _value(name: str, message: str, kinds: Mapping[str, Any]) -> str:
    """What is wrong with the value of an option."""
    unknown = re.search(r"Option '([\w.-]+)' is not accepted", message)
    kind = kinds.get(name)
    if unknown:
        return f"{dashed(name)} has no entry {unknown[1]!r}; it takes {type_words(kind)}"
    nested = re.search(r"NestedArg\(key='([\w.]+)', val='?(.*?)'?\)", message)
    within = re.search(r"Parser key \"(\w+)\":(.*)", message.partition("\n")[2], re.DOTALL)
    inside = nested or within
    if inside is not None:
        name, kind = f"{name}.{inside[1]}", _field_kind(kind, inside[1])
    given = [nested[2]] if nested else re.findall(r"(?:Got value|Given value): (.*)", within[2] if within else message)
    shown = f" is {given[0]!r}" if given else ""
    if given and of_objects(kind):
        shown = f" is {given[0]!r}, or holds it"  # which entry it is nobody says
    unlike = "Expected a dot import path" in message or "Not a valid subclass of" in message
    if kind is None or (_model_of(kind) is not None and not unlike):
        return f"{dashed(name)}{shown}: {'; '.join(reasons(message))}"
    return f"{dashed(name)}{shown}; give {type_words(kind)}"


def _model_of(kind: Any) -> type[BaseModel] | None:
    """The pydantic model that a type is, or that one of a union is."""
    models = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return models[0] if models else None


def _field_kind(kind: Any, name: str) -> Any:
    """The type of a model's field, its bounds included; None where there is no such field."""
    model = _model_of(kind)
    field = None if model is None else model.model_fields.get(name)
    if field is None:
        return None
    bounded: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return bounded


NOISE = (
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Parser key \".*\":|Given value.*"
    r"|Expected a <class 'NoneType'>|For further information visit .*|Expected a path but .*"
    r"|\d+ validation errors? for .*|Problem with given class_path .*"
)


def reasons(message: str) -> list[str]:
    """What several lines of jsonargparse and pydantic say is wrong, without what surrounds it."""
    found = []
    for line in message.splitlines():
        text = re.sub(r"\s*\[type=.*\]$", "", line.strip().removeprefix("- ")).removeprefix("Value error, ")
        text = re.sub(r"\. Got value: .*$", "", text)
        if text and not re.fullmatch(NOISE, text):
            found.append(text)
    return list(dict.fromkeys(found))
