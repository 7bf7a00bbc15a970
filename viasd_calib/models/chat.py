"""Conversations as token ids, by the tokenizer's own chat template: a program that may fail in any way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from viasd_calib.errors import ModelError, PromptError, TemplateWarning

DEFAULT = "default"
TRIAL = [{"role": "user", "content": "x"}]
"""A conversation that every template can write."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that conversations are written with: the only one, or of several that of the name ``default``.

    Raises:
        ModelError: there are several, none of which is the default.
    """
    found: str | Mapping[str, str] | None = tokenizer.chat_template
    if not isinstance(found, Mapping):
        return found
    if DEFAULT not in found:
        raise ModelError(
            f"the tokenizer has chat templates for {', '.join(sorted(found))}, and no default; "
            f"give one of them the name {DEFAULT!r} in its tokenizer_config.json"
        )
    return found[DEFAULT]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, JsonValue] | None = None,
) -> list[int]:
    """Ids of a conversation up to where the assistant's answer begins.

    Without a template its turns are lines of one text.

    Args:
        turns: messages with ``role`` and ``content``.
        arguments: what the template is told beside them.

    Raises:
        PromptError: the template refuses the conversation, or writes nothing for it.
        ModelError: there are several templates, none of which is the default.
    """
    template = template_of(tokenizer)
    if template is None:
        return list(tokenizer("\n".join(turn["content"] for turn in turns)).input_ids)
    told: dict[str, Any] = {**(arguments or {}), "chat_template": template}
    try:
        ids: Any = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=True, return_dict=False, **told
        )
    except Exception as error:  # whatever the template's author, or what it calls, thought of
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        refused = f"the verifier's chat template refuses the conversation ({reason})"
        raise PromptError(f"{refused}; {_mend(turns)}") from error
    if not ids:
        raise PromptError(
            "the verifier's chat template writes nothing for the conversation; mend the template, or remove it so that "
            "the turns are taken as plain text"
        )
    return list(ids)


def _mend(turns: Sequence[Mapping[str, Any]]) -> str:
    if any(turn["role"] == "system" for turn in turns):
        return "leave out the system prompt, put it into the user's first turn, or give the tokenizer another template"
    return "change the conversation, or give the tokenizer another template"


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Look at the template once, when a verifier is loaded.

    What it thinks of a conversation shows when one is written.

    Args:
        name: of the verifier.

    Raises:
        ModelError: it is no template at all, or there are several without a default.
    """
    template = template_of(tokenizer)
    if template is None:
        return
    try:
        ids = encode_conversation(tokenizer, TRIAL)
    except PromptError as error:
        wrong = error.__cause__
        if isinstance(wrong, TemplateSyntaxError):
            raise ModelError(
                f"the chat template of {name} is not valid (line {wrong.lineno}: {wrong.message}); mend it in the "
                "tokenizer's folder, or remove it so that turns are taken as plain text"
            ) from error
        return
    start = tokenizer.bos_token_id
    if start is not None and ids[:2] == [start, start]:
        warnings.warn(
            f"the chat template of {name} writes {tokenizer.bos_token!r} twice at the beginning, which hardly a model "
            "was trained on; texts are left as the template has them",
            TemplateWarning,
            stacklevel=2,
        )
