"""The shapes that prompt files have, and each as fields of :class:`~viasd_calib.prompts.schema.Prompt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

IDS = ("id", "question_id", "prompt_id", "task_id")
TASKS = ("task", "category")
ANSWERS = ("completion", "output", "response", "answer", "answers")
ROLES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Roles of a message as others call them."""
MESSAGE_KEYS = frozenset({"role", "from", "content", "value", "text"})
"""What a message holds, by all names for it."""


class Fields:
    """An entry's fields, and which of them have been used.

    A field without a value counts as absent.

    Example:
        >>> fields = Fields({"question_id": 81, "category": None, "turns": ["Why?"]})
        >>> fields.take("id", "question_id"), fields.take("category"), fields.unused
        (81, None, ['turns'])
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self._entry = {key: value for key, value in entry.items() if value is not None}
        self._used: set[str] = set()
        self._left: dict[str, None] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entry

    def take(self, *keys: str) -> Any:
        """The value of the first of some keys that is there; None where none is."""
        for key in keys:
            if key in self._entry:
                self._used.add(key)
                return self._entry[key]
        return None

    def leave(self, key: str) -> None:
        """Count a key within one of the values as not used."""
        self._left[key] = None

    @property
    def unused(self) -> list[str]:
        """Keys whose values were not taken."""
        return [*(key for key in self._entry if key not in self._used), *self._left]


def _turns(fields: Fields) -> dict[str, Any]:
    return {"turns": fields.take("turns"), "messages": messages_of(fields.take("messages"), fields)}


def _messages(fields: Fields) -> dict[str, Any]:
    return {"messages": messages_of(fields.take("messages"), fields)}


def _conversations(fields: Fields) -> dict[str, Any]:
    return {"messages": messages_of(fields.take("conversations", "conversation"), fields)}


def _prompt(fields: Fields) -> dict[str, Any]:
    asked = fields.take("prompt")
    said = {"messages": messages_of(asked, fields)} if isinstance(asked, list) else {"turns": [asked]}
    return {**said, "reference": _answer(fields.take(*ANSWERS))}


def _instruction(fields: Fields) -> dict[str, Any]:
    parts = [fields.take("instruction"), fields.take("input", "context")]
    texts = [part for part in parts if not (isinstance(part, str) and not part.strip()) and part is not None]
    turn = "\n\n".join(texts) if all(isinstance(text, str) for text in texts) else parts[0]
    return {"turns": [turn], "reference": _answer(fields.take(*ANSWERS))}


def _question(fields: Fields) -> dict[str, Any]:
    return {"turns": [fields.take("question")], "reference": _answer(fields.take(*ANSWERS))}


def _answer(value: Any) -> Any:
    """An answer as a reference: the text of a single message, anything else as it is."""
    single = len(value) == 1 and isinstance(value[0], Mapping) if isinstance(value, list) else False
    return value[0].get("content", value) if single else value


@dataclass(frozen=True)
class Shape:
    """One way to write a prompt.

    Attributes:
        name: what the user is told.
        key: the field that tells it.
        convert: fields of a prompt, from those of an entry.
    """

    name: str
    key: str
    convert: Callable[[Fields], dict[str, Any]]


SHAPES = (
    Shape("", "turns", _turns),
    Shape("OpenAI messages", "messages", _messages),
    Shape("ShareGPT conversations", "conversations", _conversations),
    Shape("ShareGPT conversations", "conversation", _conversations),
    Shape("Alpaca instructions", "instruction", _instruction),
    Shape("prompt/completion", "prompt", _prompt),
    Shape("question/answer", "question", _question),
)
"""In the order in which they are looked for; the first is the project's own."""
BENCHMARK = "MT-bench/Spec-Bench"


@dataclass(frozen=True)
class Recognised:
    """An entry whose shape is known.

    Attributes:
        shape: its name; empty for the project's own.
        fields: of a prompt, not yet validated.
        unused: keys of the entry that say nothing to us.
    """

    shape: str
    fields: dict[str, Any]
    unused: list[str]


def recognise(entry: Mapping[str, Any]) -> Recognised | None:
    """An entry of a prompt file as fields of a prompt; None where nothing in it is a prompt.

    Example:
        >>> found = recognise({"instruction": "Add.", "input": "1 and 2", "output": "3", "author": "me"})
        >>> found.shape, found.fields, found.unused
        ('Alpaca instructions', {'turns': ['Add.\\n\\n1 and 2'], 'reference': '3'}, ['author'])
    """
    fields = Fields(entry)
    shape = next((shape for shape in SHAPES if shape.key in fields), None)
    if shape is None:
        return None
    name = BENCHMARK if shape.key == "turns" and "question_id" in fields and "id" not in fields else shape.name
    common = {
        "id": _number_as_text(fields.take(*IDS)),
        "task": _number_as_text(fields.take(*TASKS)),
        "reference": fields.take("reference"),
        "system": fields.take("system", "system_prompt"),
        "chat_template_kwargs": fields.take("chat_template_kwargs"),
    }
    common = {key: value for key, value in common.items() if value is not None}
    own = {key: value for key, value in shape.convert(fields).items() if value is not None}
    return Recognised(name, {**own, **common}, fields.unused)


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def messages_of(value: Any, fields: Fields) -> Any:
    """A conversation's messages as ``role`` and ``content``, from any of the usual ways to write them.

    What is no such list is returned as it is, for the schema to complain of.

    Example:
        >>> messages_of([{"from": "human", "value": "Why?"}], Fields({}))
        [{'role': 'user', 'content': 'Why?'}]
    """
    if not isinstance(value, list):
        return value
    return [_message(one, fields) if isinstance(one, Mapping) else one for one in value]


def _message(said: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    for key in said:
        if key not in MESSAGE_KEYS and said[key] is not None:
            fields.leave(f"{key} of messages")
    role = said.get("role", said.get("from"))
    content = next((said[key] for key in ("content", "value", "text") if said.get(key) is not None), None)
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    known = {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
    return {key: value for key, value in known.items() if value is not None}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
