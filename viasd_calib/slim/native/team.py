"""How many threads run the kernels: fewer while other work has some of their cores.

A thread that another process has put off its core is waited for until it runs again, some milliseconds, which is
longer than a pass of a small model takes; one thread less is then faster. What a pass gives does not depend on how many
run it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from viasd_calib.slim.native.library import kernels

TRIAL = 32
"""Calls with one thread more, in which none may be late."""
SHORTEST_PAUSE = 32
"""Calls with fewer threads, after which one more is tried."""
LONGEST_PAUSE = 1024
"""The same, after trials that failed."""
WEIGHT, MOST = 8, 20
"""What a late call adds to a sum from which others take 1, and what that sum may come to: two late ones are chance."""


class Team:
    """Threads for the calls of one thread of the process.

    Attributes:
        most: threads that a call may take.
        size: threads that the next call takes, 1 to ``most``.

    Example:
        >>> two = Team(2)
        >>> two.size, [two.note(True) for _ in range(3)], two.size
        (2, [None, None, None], 1)
    """

    def __init__(self, most: int) -> None:
        self.most = self.size = most
        self._late = self._trial = 0
        self._pause = self._left = SHORTEST_PAUSE

    def note(self, late: bool) -> None:
        """Learn whether a thread of the last call was waited for that did not run.

        Several such calls near each other, or one while another thread is tried, are answered with a thread less.
        """
        self._late = self._late + WEIGHT if late else max(0, self._late - 1)
        if late and (self._trial or self._late > MOST):
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._trial else SHORTEST_PAUSE
            self.size, self._left = max(1, self.size - 1), self._pause
            self._late = self._trial = 0
        elif self._trial:
            self._trial -= 1
        elif self.size < self.most:
            self._left -= 1
            if self._left == 0:
                self.size, self._left, self._trial = self.size + 1, self._pause, TRIAL


class _Teams(threading.local):
    own: Team | None = None


TEAMS = _Teams()


def team() -> Team:
    """The team of the thread that asks; a new one after ``torch.set_num_threads`` has set another number."""
    most = torch.get_num_threads()
    if TEAMS.own is None or TEAMS.own.most != most:
        TEAMS.own = Team(most)
    return TEAMS.own


def call(name: str, *arguments: Any) -> None:
    """Call a kernel that shares its work among threads, with as many of them as run.

    Args:
        arguments: all but the last one, the number of threads.
    """
    own = team()
    own.note(bool(getattr(kernels(), name)(*arguments, own.size)))
