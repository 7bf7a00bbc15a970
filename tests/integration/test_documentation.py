"""Blocks of code in README and documentation: each is run, or says why it is not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from viasd_calib.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ROOT / "docs" / "reference"
REASONS = ("network", "GPU", "longer than two minutes")
BLOCK = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<kind>python|bash|sh)\n(?P<code>.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A block of code, its page and line, and the note before it."""

    page: Path
    line: int
    kind: str
    code: str
    note: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start("code")].count("\n"), found["kind"], found["code"], found["note"] or "")
        for found in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES if GENERATED not in page.parents for block in blocks_of(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    allowed = ["run: whole", *(f"not run: {reason}" for reason in REASONS)]
    assert block.note in allowed, f"{block.name} has the note {block.note!r} before it, not one of {allowed}"


@pytest.mark.slow
@pytest.mark.parametrize("block", [one for one in BLOCKS if one.note == "run: whole"], ids=lambda block: block.name)
def test_a_block_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if block.kind == "python":
        exec(compile(block.code, block.name, "exec"), {"__name__": "__main__"})
        return
    for command in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        assert words[0] == "viasd", f"{block.name}: {command}"
        assert main(words[1:]) == 0, f"{block.name}: {command}"


def test_blocks_of_every_kind_are_found() -> None:
    """The tests above look at something."""
    assert {block.kind for block in BLOCKS if block.note == "run: whole"} == {"python", "bash"}
    assert len(BLOCKS) > 8
