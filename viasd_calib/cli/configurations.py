"""Configuration files, checked before a parser reads them: YAML lets an entry stand twice, and takes the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from viasd_calib.errors import UsageError
from viasd_calib.shipped import brought, shipped_configuration


def read_configuration(path: str, option: str = "--config") -> dict[str, Any]:
    """The entries of a configuration, YAML or JSON.

    Raises:
        UsageError: missing, not text, not YAML, no mapping, or an entry that stands in it twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        found = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration {path}: {error.strerror}; give {option} the path of a YAML file, or the "
            f"name of one that comes with the package ({brought('configs')})"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the configuration {path} is no text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UsageError(f"the configuration {path}{where}: no valid YAML, {problem}; mend that line") from error
    if not isinstance(found, dict):
        raise UsageError(f"the configuration {path} has no entries; write one a line, as in max_new_tokens: 64")
    assert root is not None, "a mapping was read from it"
    for name, line in _doubles(root):
        raise UsageError(f"the configuration {path}, line {line}: {name} stands there twice; leave one of them out")
    return found


def with_shipped_configurations(words: Sequence[str]) -> list[str]:
    """Words in which ``--config quickstart`` names the file that came with the package."""
    found = []
    before = ""
    for word in words:
        if before in ("--config", "-c"):
            found.append(shipped_configuration(word))
        elif word.startswith("--config="):
            found.append(f"--config={shipped_configuration(word.removeprefix('--config='))}")
        else:
            found.append(word)
        before = word
    return found


def _doubles(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """Entries that stand twice in one mapping, with the line of the second."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _doubles(item)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield str(key.value), key.start_mark.line + 1
            seen.add(key.value)
            yield from _doubles(value)


def flattened(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries within entries by names with dots; lists stay whole.

    Example:
        >>> flattened({"trainer": {"max_steps": 3}, "out": "a"})
        {'trainer.max_steps': 3, 'out': 'a'}
    """
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def given_options(words: Sequence[str]) -> dict[str, Any]:
    """Options in words and in the configurations they name, later over earlier ones, before any parser reads them.

    Raises:
        UsageError: a configuration cannot be read.

    Example:
        >>> given_options(["--trainer.max_steps", "3", "--out=a", "--trainer.max_steps=4"])
        {'trainer.max_steps': 4, 'out': 'a'}
    """
    found: dict[str, Any] = {}
    for place, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") and word != "-c":
            continue
        if not equals:
            after = words[place + 1] if place + 1 < len(words) else "--"
            value = "true" if after.startswith("--") else after  # a flag may stand alone
        if name in ("config", "-c"):
            found |= flattened(read_configuration(value))
        else:
            found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """The value of a word: itself, where it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
