"""The progress bar of long jobs: what runs, how far it is, what is left."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(unit: str, *, by_hand: bool = False) -> Progress:
    """A bar that counts ``unit``; each task's description says what runs.

    Args:
        by_hand: draw when told to (``refresh=True``) and never on the side, where that would disturb a timing.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        auto_refresh=not by_hand,
    )
