"""Prompt files, and the split of prompts by hash.

A prompt file is JSONL, one object a line::

    {"id": "mine/1", "task": "qa", "turns": ["Why is the sky blue?"], "reference": null}

It is how users bring their own domain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from viasd_calib.errors import PromptError

Split = Literal["fit", "calibrate", "test"]

EMBEDDED = "embedded"
"""The name under which the package's own prompts are asked for, in place of a path."""


class Prompt(BaseModel):
    """One conversation to be answered: its user turns, in order.

    Example:
        >>> Prompt(id="a", task="qa", turns=["Why?"], reference=None).sha256[:8]
        'e554f91c'
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str = Field(min_length=1)
    task: str = Field(min_length=1)
    turns: list[str] = Field(min_length=1)
    reference: JsonValue = None
    """What a task's metric compares answers with; benchmarks differ in its form, so any JSON is let through."""

    @property
    def sha256(self) -> str:
        """Hash of the turns alone: renaming a prompt does not move it to another split."""
        return hashlib.sha256(json.dumps(self.turns, ensure_ascii=False).encode()).hexdigest()


class SplitShares(BaseModel):
    """Shares of the fit, calibrate and test splits.

    Example:
        >>> SplitShares(fit=0.5, calibrate=0.3, test=0.3)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        pydantic_core._pydantic_core.ValidationError: shares of the splits must sum to 1
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fit: float = Field(0.40, ge=0, le=1)
    calibrate: float = Field(0.45, ge=0, le=1)
    test: float = Field(0.15, ge=0, le=1)

    def model_post_init(self, _context: object) -> None:
        if abs(self.fit + self.calibrate + self.test - 1) > 1e-6:
            raise ValueError("shares of the splits must sum to 1")


def split_of(sha256: str, shares: SplitShares) -> Split:
    """The split a prompt belongs to, decided by its hash alone.

    Example:
        >>> split_of("00" * 32, SplitShares()), split_of("ff" * 32, SplitShares())
        ('fit', 'test')
    """
    place = int(sha256[:12], 16) / 16**12
    if place < shares.fit:
        return "fit"
    if place < shares.fit + shares.calibrate:
        return "calibrate"
    return "test"


def select_split(prompts: Iterable[Prompt], split: Split, shares: SplitShares) -> list[Prompt]:
    """The prompts of one split, in the order of the file."""
    return [prompt for prompt in prompts if split_of(prompt.sha256, shares) == split]


def draw_prompts(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """``limit`` of the prompts, as if at random but always the same ones: those with the lowest hashes.

    A file is often sorted by task; its first lines would stand for one task alone.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return sorted(prompts, key=lambda prompt: prompt.sha256)[:limit]


def combined_sha256(hashes: Iterable[str]) -> str:
    """One hash for a set of prompts' hashes, whatever their order and however often each is given."""
    return hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest()


def split_sha256(prompts: Iterable[Prompt]) -> str:
    """One hash for a set of prompts; the spec records it."""
    return combined_sha256(prompt.sha256 for prompt in prompts)


def read_prompts(source: str | Path) -> list[Prompt]:
    """Read a prompt file, or the package's own prompts where ``source`` is ``"embedded"``.

    Raises:
        PromptError: no such file, no prompt in it, or a line that is not a prompt (its number is named).
    """
    name, text = _read_source(source)
    prompts = [_parse_line(name, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise PromptError(f"{name}: no prompts; write one JSON object a line with id, task, turns and reference")
    _refuse_doubles(name, prompts)
    return prompts


def _read_source(source: str | Path) -> tuple[str, str]:
    if source == EMBEDDED:
        return "embedded prompts", resources.files("viasd_calib").joinpath("data/prompts.jsonl").read_text("utf-8")
    path = Path(source)
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text (byte {error.start}); save the prompts as UTF-8 JSONL") from error
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path}: {error.strerror}; check the path") from error


def _parse_line(name: str, number: int, line: str) -> Prompt:
    try:
        return Prompt.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "line"
        raise PromptError(f"{name}, line {number}: {where}: {first['msg']}; mend that line and run again") from error


def _refuse_doubles(name: str, prompts: Sequence[Prompt]) -> None:
    seen: dict[str, int] = {}
    for number, prompt in enumerate(prompts, 1):
        if prompt.id in seen:
            raise PromptError(
                f"{name}: prompts {seen[prompt.id]} and {number} share the id {prompt.id!r}; give each its own"
            )
        seen[prompt.id] = number
