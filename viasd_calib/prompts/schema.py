"""The schema of a prompt: a conversation to be answered, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

DEFAULT_TASK = "default"
"""The task of a prompt that names none."""

LONGEST_TEXT = 10_000_000
"""Characters of a text at most: more fit no model's context, and take minutes to tokenise."""

DECIDED_HERE = frozenset({
    "conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors",
    "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of transformers' ``apply_chat_template`` that say how it is called, not what the template is told."""


def check_text(text: str) -> str:
    """A text that a model can be given; it may be empty.

    Raises:
        ValueError: it holds a NUL or half a character, or is longer than ``LONGEST_TEXT``.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"has {len(text):,} characters, more than the {LONGEST_TEXT:,} that are read")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a character (a lone surrogate)")
    return text


def check_spoken(text: str) -> str:
    """A text as :func:`check_text` wants it, that is more than white space.

    Raises:
        ValueError: it is not.
    """
    if not text.strip():
        raise ValueError("is blank")
    return check_text(text)


Text = Annotated[str, AfterValidator(check_text)]
Spoken = Annotated[str, AfterValidator(check_spoken)]


class Message(BaseModel):
    """One message of a conversation.

    Example:
        >>> Message(role="user", content="Why?").model_dump()
        {'role': 'user', 'content': 'Why?'}
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Text


class Prompt(BaseModel):
    """One conversation to be answered: the user's turns, in order, each after the answers to those before it.

    A conversation that is given whole, as ``messages`` without ``turns``, is taken apart: its first message is
    ``system`` where it is the system's, its last one the only turn, and an assistant's message after that the
    ``reference``, where there is no other. So the same conversation has one hash, however it was written.

    Attributes:
        id: unique in a file.
        task: what results are grouped by.
        turns: what the user says, one turn after the other, each to be answered.
        reference: what a task's metric compares answers with; benchmarks differ in its form, so it may be any JSON.
        system: the system's message; None leaves it to the chat template, an empty one says nothing.
        messages: what was said before the first turn, answers included.
        chat_template_kwargs: what the chat template is told beside the messages, as ``enable_thinking``.

    Example:
        >>> Prompt(id="a", task="qa", turns=["Why?"], reference=None).sha256[:8]
        'e554f91c'
        >>> said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
        >>> whole = Prompt(id="b", messages=said)
        >>> whole.system, whole.turns, whole.messages
        ('Be brief.', ['Why?'], [])
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Spoken
    task: Spoken = DEFAULT_TASK
    turns: list[Spoken] = Field(min_length=1)
    reference: JsonValue = None
    system: Text | None = None
    messages: list[Message] = []
    chat_template_kwargs: dict[str, JsonValue] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_apart(cls, data: Any) -> Any:
        return take_apart(data) if isinstance(data, Mapping) else data

    @field_validator("messages")
    @classmethod
    def _well_formed(cls, messages: list[Message]) -> list[Message]:
        """Complain of what :func:`take_apart` has left as it was."""
        if messages and messages[0].role == "system":
            raise ValueError("begin with a system message beside the key system; keep one of them")
        if messages and messages[-1].role == "user":
            raise ValueError("end with a user's turn, and turns go on with another; put it into turns")
        return messages

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, named: dict[str, JsonValue]) -> dict[str, JsonValue]:
        taken = sorted(DECIDED_HERE & named.keys())
        if taken:
            raise ValueError(f"hold {', '.join(taken)}, which the decoder decides; leave that out")
        return named

    @property
    def sha256(self) -> str:
        """Hash of what is asked, not of id, task and reference: renaming a prompt does not move it to another split."""
        asked: Any = self.turns
        beside = self.model_dump(include={"system", "messages", "chat_template_kwargs"})
        given = {name: value for name, value in beside.items() if value not in (None, [], {})}
        if given:
            asked = {"turns": self.turns, **given}
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def conversation(self, answers: Sequence[str]) -> list[dict[str, str]]:
        """Messages up to the turn that is to be answered next, as chat templates take them.

        Args:
            answers: to the earlier turns.

        Example:
            >>> Prompt(id="a", turns=["Why?"], system="Be brief.").conversation([])
            [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Why?'}]
        """
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        said += [message.model_dump() for message in self.messages]
        for turn, answer in zip(self.turns, [*answers, ""], strict=False):
            said += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return said[:-1]


def take_apart(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a prompt from those of one whose conversation may be given whole.

    What is not as it should be stays as it is, for the schema to complain of.

    Example:
        >>> take_apart({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]})
        {'messages': [], 'turns': ['Why?'], 'reference': 'So.'}
    """
    fields = {name: value for name, value in data.items() if value is not None or name in ("reference", "system")}
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        return fields
    said = [message.model_dump() if isinstance(message, Message) else message for message in messages]
    if not all(isinstance(message, Mapping) for message in said):
        return fields
    if said[0].get("role") == "system" and fields.get("system") is None and _is_message(said[0]):
        fields["system"] = said.pop(0)["content"]
    fields["messages"] = said
    if "turns" in fields:
        return fields
    answer = said[-1] if len(said) > 1 and said[-1].get("role") == "assistant" else None
    turns = said[:-1] if answer is not None else said
    if not turns or turns[-1].get("role") != "user" or not all(_is_message(message) for message in said):
        return fields
    *before, last = turns
    fields |= {"messages": before, "turns": [last["content"]]}
    if answer is not None and fields.get("reference") is None:
        fields["reference"] = answer["content"]
    return fields


def _is_message(said: Mapping[str, Any]) -> bool:
    return set(said) == {"role", "content"} and isinstance(said["content"], str)
