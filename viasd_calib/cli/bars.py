"""Progress bars of long jobs: what runs, how far it is, what is left."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from viasd_calib.progress import Reporter, Steps


class Bar(Steps):
    """One job's bar; what is timed is drawn when it advances alone."""

    def __init__(self, description: str, total: int, unit: str, done: int, timed: bool) -> None:
        self._timed = timed
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            auto_refresh=not timed,
        )
        self._task = self._bars.add_task(description, total=total, completed=done)
        self._bars.start()

    def advance(self, count: int = 1) -> None:
        """Draw it further."""
        self._bars.update(self._task, advance=count, refresh=self._timed)

    def update(self, done: int, total: int) -> None:
        """Draw it anew."""
        self._bars.update(self._task, completed=done, total=total, refresh=self._timed)

    def finish(self) -> None:
        """Leave it as it is now."""
        self._bars.stop()


class Screen(Reporter):
    """Bars for jobs, and lines on stdout."""

    def start(self, description: str, total: int, unit: str, *, done: int = 0, timed: bool = False) -> Steps:
        """A bar for the job."""
        return Bar(description, total, unit, done, timed)

    def say(self, line: str) -> None:
        """Print the line."""
        print(line)
