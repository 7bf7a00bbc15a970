"""What is wrong with an entry of a prompt file: all of its fields at once, and how it should be."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

EXAMPLE: dict[str, Any] = {
    "id": "mine/1",
    "task": "qa",
    "turns": ["Why is the sky blue?"],
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "chat_template_kwargs": {"enable_thinking": False},
}
"""A right value for each field."""
BEFORE_TURNS = [*EXAMPLE["messages"], {"role": "assistant", "content": "Air scatters blue light most."}]
"""The same for messages that turns follow on."""
USUAL = ("id", "task", "turns")
SHOWN_CHARACTERS = 40


def describe_wrong(error: ValidationError, fields: Mapping[str, Any], delimiter: str = "") -> str:
    """Every wrong field of an entry, and the entry as it should be, in one line.

    Args:
        fields: of a prompt, as they were validated.
        delimiter: as for :func:`as_it_should_be`.
    """
    details = error.errors(include_url=False)
    wrong = {str(one["loc"][0]) for one in details if one["loc"]}
    return f"{'; '.join(complaints(error, fields))}; {as_it_should_be(fields, wrong, delimiter)}"


def complaints(error: ValidationError, fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with each field of an entry; each begins with the field's name."""
    details = error.errors(include_url=False)
    if any(one["loc"][:1] == ("messages",) for one in details):  # then what is missing is missing in them
        details = [one for one in details if one["loc"] != ("turns",) or one["type"] != "missing"]
    return list(dict.fromkeys(_complaint(one, fields) for one in details))


def as_it_should_be(fields: Mapping[str, Any], wrong: set[str], delimiter: str = "") -> str:
    """An entry with its wrong fields mended, as far as one can guess.

    Args:
        delimiter: between cells, of an entry that is the row of a table; empty where it is JSON.

    Example:
        >>> as_it_should_be({"turns": [" "]}, {"turns"})
        'it should be as {"turns": ["Why is the sky blue?"]}'
        >>> as_it_should_be({"task": "qa", "turns": ["Yes, or no?", " "]}, {"turns"}, ",")
        'it should be as qa,"[""Yes, or no?"", ""Why is the sky blue?""]" under the heading task,turns'
    """
    mended: dict[str, Any] = {}
    if not fields:
        mended = {name: EXAMPLE[name] for name in USUAL}
    for name, value in fields.items():
        mended[name] = _mended(name, value) if name in wrong else value
    if "messages" in wrong and "turns" in mended:
        mended["messages"] = BEFORE_TURNS
    elif "turns" in wrong and "messages" in mended:
        mended["messages"] = EXAMPLE["messages"]
    elif "turns" in wrong:
        mended.setdefault("turns", EXAMPLE["turns"])
    shown = _shortened(mended)
    if delimiter:
        row, heading = _row(map(_cell, shown.values()), delimiter), _row(shown, delimiter)
        return f"it should be as {row} under the heading {heading}"
    return f"it should be as {json.dumps(shown, ensure_ascii=False, default=str)}"


def _row(cells: Iterable[str], delimiter: str) -> str:
    """Cells as a table has them, in one line."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="").writerow([" ".join(cell.split()) for cell in cells])
    return text.getvalue()


def _cell(value: Any) -> str:
    """A value as a cell holds it: a text, or one turn, as it is, anything else as JSON."""
    single = value[0] if isinstance(value, list) and len(value) == 1 else value
    return single if isinstance(single, str) else json.dumps(value, ensure_ascii=False, default=str)


def _mended(name: str, value: Any) -> Any:
    if name != "turns":
        return EXAMPLE.get(name, value)
    turns = value if isinstance(value, list) else [value]
    texts = [str(turn) if isinstance(turn, str | int | float) else "" for turn in turns]
    return [text if text.strip() else EXAMPLE["turns"][0] for text in texts] or EXAMPLE["turns"]


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        shown = "".join("?" if character == "\0" or "\ud800" <= character <= "\udfff" else character for character in
                        value[:SHOWN_CHARACTERS])  # fmt: skip
        return shown if len(value) <= SHOWN_CHARACTERS else f"{shown}..."
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        shown_items = [_shortened(inner) for inner in value[:3]]
        return shown_items if len(value) <= 3 else [*shown_items, "..."]
    return value


def _complaint(detail: ErrorDetails, fields: Mapping[str, Any]) -> str:
    """One wrong field, and what is wrong with it."""
    kind, where = detail["type"], ".".join(str(part) for part in detail["loc"])
    if detail["loc"] == ("turns",) and kind == "missing" and "messages" in fields:
        return "messages do not end with a user's turn, or with the assistant's answer to it"
    if detail["loc"][-1:] == ("[key]",):
        return f"{detail['loc'][0]} has the key {_described(detail['input'])}, not a text"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        return f"{where} {detail['ctx']['error']}"
    if kind == "too_short":
        return f"{where} is empty"
    found = _described(detail["input"])
    wanted = {
        "string_type": "a text",
        "list_type": "a list",
        "dict_type": "an object",
        "model_type": "an object with role and content",
        "literal_error": "system, user or assistant",
    }.get(kind)
    return f"{where} is {found}, not {wanted}" if wanted else f"{where}: {detail['msg']} (found {found})"


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {json.dumps(_shortened(value), ensure_ascii=False)}"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list) else json.dumps(value, default=str)
