"""Prompts: their schema, reading them from the files people have, and their split by hash.

A prompt file of the project's own form is JSONL, one object a line::

    {"id": "mine/1", "task": "qa", "turns": ["Why is the sky blue?"], "reference": null}

``turns`` alone must be there. ``system``, ``messages`` (what was said before, or the whole conversation in place of
``turns``) and ``chat_template_kwargs`` may stand beside it. It is how users bring their own domain. Other usual shapes
and formats are recognised: see :func:`read_prompt_file`. Nothing here loads torch or transformers.
"""

from viasd_calib.prompts.reading import EMBEDDED, PromptFile, read_prompt_file, read_prompts
from viasd_calib.prompts.schema import DEFAULT_TASK, Message, Prompt
from viasd_calib.prompts.splits import (
    Split,
    SplitShares,
    combined_sha256,
    draw_prompts,
    select_split,
    split_of,
    split_sha256,
    step_names,
)

__all__ = [
    "DEFAULT_TASK",
    "EMBEDDED",
    "Message",
    "Prompt",
    "PromptFile",
    "Split",
    "SplitShares",
    "combined_sha256",
    "draw_prompts",
    "read_prompt_file",
    "read_prompts",
    "select_split",
    "split_of",
    "split_sha256",
    "step_names",
]
