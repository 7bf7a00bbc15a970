"""What ``viasd generate`` prints: the text itself, as it is; with its tiers in colour, or in lines; several as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from viasd_calib.prompts import Prompt

TIER_STYLES = {"accept": "green", "regenerate": "yellow", "escalate": "blue"}
"""Colours of the tiers, by their names."""

HELD_BACK = "-"
"""What stands in place of a tier before text that only the end of the answer settles."""

Pieces = Iterable[tuple[str, str | None]]
"""Text that each token adds and the name of its tier; None for what was held back until the end."""


def print_answer(pieces: Pieces) -> None:
    """Print an answer as it comes, and end the line.

    A file or pipe gets the text byte for byte, in UTF-8. A terminal gets it without control characters, which would
    move the cursor or worse.
    """
    console = new_console()
    for piece, _ in pieces:
        if sys.stdout.isatty():
            console.print(Text(piece), end="")
        else:
            write_text(piece)
    write_text("\n")


def print_answers(answered: Iterable[tuple[Prompt, list[str]]]) -> None:
    """Print each prompt's id and answers as a line of JSON, once they are written."""
    for prompt, answers in answered:
        write_text(json.dumps({"id": prompt.id, "answers": answers}, ensure_ascii=False) + "\n")


def print_tiers(pieces: Pieces) -> int:
    """Print an answer with the tier that decided each token: by colour where there is any, else a line a token.

    Such a line is the tier, a tab and the token's text as a JSON string. Together the strings are the answer; what a
    text that breaks off inside of a character ends with stands in a last line of its own, after :data:`HELD_BACK`.

    Returns:
        How many tokens there were.
    """
    console = new_console()
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    count = 0
    for piece, tier in pieces:
        count += tier is not None
        if coloured:
            console.print(Text(piece, style=TIER_STYLES.get(tier or "", "")), end="")
        elif tier is not None or piece:
            write_text(f"{tier or HELD_BACK}\t{json.dumps(piece, ensure_ascii=False)}\n")
    if coloured:
        legend = "  ".join(f"[{style}]{name}[/]" for name, style in TIER_STYLES.items())
        console.print(f"\n[dim]tiers:[/] {legend}")
    return count


def new_console() -> Console:
    """Standard output, with nothing wrapped and nothing highlighted."""
    return Console(highlight=False, soft_wrap=True)


def write_text(text: str) -> None:
    """Write to standard output in UTF-8, whatever its encoding and the platform's line ends are."""
    stream = sys.stdout
    buffer = getattr(stream, "buffer", None)  # a notebook's has none
    if buffer is None:
        stream.write(text)
    else:
        stream.flush()
        buffer.write(text.encode("utf-8", "surrogatepass"))  # half of a pair is not UTF-8, but it is the text
    stream.flush()
