"""Tables as every command prints them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def new_table(title: str, headings: Sequence[str], caption: str | None = None) -> Table:
    """A table without rows.

    Args:
        headings: of the columns; the first holds words, the others numbers.

    Example:
        >>> table = new_table("speed", ["", "tokens/s"])
        >>> [column.justify for column in table.columns]
        ['left', 'right']
    """
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    first, *numbers = headings
    table.add_column(first, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
