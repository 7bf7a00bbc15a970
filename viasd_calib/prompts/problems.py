"""What is wrong with an entry of a prompt file: all of its fields at once, and how it should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def describe_wrong(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """Every wrong field of an entry, and the entry as it should be, in one line.

    Args:
        fields: of a prompt, as they were validated.
    """
    details = error.errors(include_url=False)
    wrong = {str(one["loc"][0]) for one in details if one["loc"]}
    if "messages" in wrong:  # then what is missing is missing in them
        details = [one for one in details if one["loc"] != ("turns",) or one["type"] != "missing"]
    return f"{'; '.join(dict.fromkeys(_complaint(one, fields) for one in details))}; {as_it_should_be(fields, wrong)}"


def as_it_should_be(fields: Mapping[str, Any], wrong: set[str]) -> str:
    """An entry with its wrong fields mended, as far as one can guess."""
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
    return f"it should be as {json.dumps(_shortened(mended), ensure_ascii=False, default=str)}"


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
