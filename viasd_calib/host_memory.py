"""Keeping freed memory on the host, and giving it back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGE = 2**31 - 1
SMALL = 2**23
"""Bytes from which on a block goes back once it is freed, where memory is little."""
_kept = False
"""Whether glibc was told to keep freed blocks."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next tensor in place of giving them back to the kernel.

    A forward on the CPU frees and takes large blocks all the time; by default each of them is mapped and
    cleared anew, which was measured at a third of the time of training on two cores.

    Returns:
        Whether the C library took the setting; false where it is not glibc.
    """
    global _kept
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    _kept = bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, LARGE))
    return _kept


@contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """For as long as the block lasts, let glibc give freed blocks back, if it was told to keep them.

    For passes whose weights come and go: the gaps that they leave were measured at as much as all else in memory.
    """
    mallopt, kept = _of_glibc("mallopt"), _kept
    try:
        if kept:
            mallopt(M_MMAP_THRESHOLD, SMALL)
            mallopt(M_TRIM_THRESHOLD, SMALL)
            give_freed_memory_back()
        yield
    finally:
        if kept:
            keep_freed_memory()


def give_freed_memory_back() -> bool:
    """Let glibc give the kernel what it keeps of freed blocks, for a program whose memory is to stay small.

    Tensors that come and go while others stay leave gaps, which were measured at three times what stayed.

    Returns:
        Whether it gave something back; false where the C library is not glibc.
    """
    trim = _of_glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def _of_glibc(name: str) -> Any:
    """A function of the C library that glibc alone has; None where it lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
