"""What long jobs tell whoever started them: how far they are, and a line now and then. Nothing is drawn here.

A job calls :func:`steps`, :func:`tracked` and :func:`say`. Who wants to see it installs a :class:`Reporter`, as the
command line does with its progress bars:

>>> class Printed(Reporter):
...     def say(self, line: str) -> None:
...         print(line)
>>> with reporting(Printed()):
...     say("8 prompts are read")
8 prompts are read
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")


class Steps:
    """Told how far one job is; this one shows nothing."""

    def advance(self, count: int = 1) -> None:
        """So many more steps are done."""

    def update(self, done: int, total: int) -> None:
        """So many steps are done, of so many that there are after all."""

    def finish(self) -> None:
        """The job has ended, or failed."""


class Reporter:
    """Told what jobs do; this one shows nothing."""

    def start(self, description: str, total: int, unit: str, *, done: int = 0, timed: bool = False) -> Steps:
        """A job begins.

        Args:
            description: what runs.
            total: steps it takes.
            unit: what a step is, in the plural.
            done: steps that were done before.
            timed: whether steps are timed, so that nothing may run on the side.
        """
        return Steps()

    def say(self, line: str) -> None:
        """A job has found something that a user may want to know."""


_SILENT = Reporter()
_reporter: ContextVar[Reporter] = ContextVar("_reporter", default=_SILENT)
"""Whom jobs of this context tell."""


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Within it, jobs tell ``reporter``."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def steps(description: str, total: int, unit: str, *, done: int = 0, timed: bool = False) -> Iterator[Steps]:
    """A job of ``total`` steps; arguments as in :meth:`Reporter.start`."""
    running = _reporter.get().start(description, total, unit, done=done, timed=timed)
    try:
        yield running
    finally:
        running.finish()


def tracked(items: Iterable[Item], description: str, total: int, unit: str) -> Generator[Item, None, None]:
    """Pass ``items`` on; each is a step that is done when the next one is asked for.

    Example:
        >>> [*tracked("ab", "spelling", 2, "letters")]
        ['a', 'b']
    """
    with steps(description, total, unit) as running:
        for item in items:
            yield item
            running.advance()


def say(line: str) -> None:
    """Tell what was found, in one line."""
    _reporter.get().say(line)
