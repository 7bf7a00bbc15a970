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

SHORTEST_PAUSE = 32
"""Calls with fewer threads, after which one more is tried."""
LONGEST_PAUSE = 1024
"""The same, after trials that failed."""


class Team:
    """Threads for the calls of one thread of the process.

    Example:
        >>> team = Team()
        >>> team.size(2), [team.note(True) for _ in range(2)], team.size(2)
        (2, [None, None], 1)
    """

    def __init__(self) -> None:
        self._most = self._size = 0
        self._late_before = self._on_trial = False
        self._pause = self._left = SHORTEST_PAUSE

    def size(self, most: int) -> int:
        """Threads of the next call, 1 to ``most``."""
        if most != self._most:
            self.__init__()  # type: ignore[misc]
            self._most = self._size = most
        return self._size

    def note(self, late: bool) -> None:
        """Learn whether a thread of the last call was waited for that did not run.

        Two such calls in succession, or the first one with a thread more, are answered with a thread less.
        """
        if late and (self._late_before or self._on_trial):
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._on_trial else SHORTEST_PAUSE
            self._size, self._left = max(1, self._size - 1), self._pause
            self._late_before = self._on_trial = False
            return
        self._late_before, self._on_trial = late, False
        if self._size == self._most:
            return
        self._left -= 1
        if self._left <= 0:
            self._size, self._left, self._on_trial = self._size + 1, self._pause, True


class _Teams(threading.local):
    def __init__(self) -> None:
        self.own = Team()


TEAMS = _Teams()


def threads() -> int:
    """Threads that the next call of this thread of the process may take."""
    return TEAMS.own.size(torch.get_num_threads())


def call(name: str, *arguments: Any) -> None:
    """Call a kernel that shares its work among threads, with as many of them as run.

    Args:
        arguments: all but the last one, the number of threads.
    """
    TEAMS.own.note(bool(getattr(kernels(), name)(*arguments, threads())))
