"""Where results are, and which step of a longer job begins."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.rule import Rule


def say_written(path: str | Path, what: str = "") -> None:
    """Say where a result is, in one line that is not broken, and in a few words what it holds."""
    Console(highlight=False, soft_wrap=True).print(f"wrote {path}{': ' if what else ''}{what}", markup=False)


def announce(title: str) -> None:
    """Say which step of a longer job begins."""
    Console().print(Rule(title, align="left"))
