"""Reading files of sublayers past the system's own cache, so that it does not stand in for memory that is not there."""

from __future__ import annotations

import errno
import mmap
import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from viasd_calib.errors import StorageError
from viasd_calib.slim.offload.layer_files import PAGE, SublayerFile, bytes_of_tensor

DIRECT = getattr(os, "O_DIRECT", 0)
"""Of Linux: a read goes from the disk to the reader's memory."""


class SublayerSource(Protocol):
    """Where the bytes of cold sublayers come from."""

    def read(self, position: int, into: memoryview) -> None:
        """Bring a sublayer's bytes to memory.

        Args:
            position: of the sublayer among the cold ones.

        Raises:
            StorageError: they cannot be read, or are no longer what they were.
        """
        ...


class DiskSource:
    """Files, held open: what is removed from a folder is still read, what is changed is refused.

    Raises:
        StorageError: a file cannot be opened.
    """

    def __init__(self, files: Sequence[SublayerFile]) -> None:
        self._files = files
        self._descriptors: list[int] = []
        weakref.finalize(self, _close, self._descriptors)
        self._stamps: list[tuple[int, int]] = []
        self.direct = True
        for file in files:
            self._descriptors.append(self._open(file.path))
            self._stamps.append(_stamp(self._descriptors[-1]))

    def _open(self, path: Path) -> int:
        try:
            if self.direct and DIRECT:
                try:
                    return os.open(path, os.O_RDONLY | DIRECT)
                except OSError:  # a file system in memory, among others, has no such reads
                    self.direct = False
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}; run again to make it anew") from error

    def read(self, position: int, into: memoryview) -> None:
        descriptor, file = self._descriptors[position], self._files[position]
        try:
            done = self._fill(descriptor, into[: file.bytes])
            if not (self.direct and DIRECT) and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, file.bytes, os.POSIX_FADV_DONTNEED)
            changed = _stamp(descriptor) != self._stamps[position]
        except OSError as error:
            raise StorageError(f"cannot read {file.path}: {error.strerror or error}; run again") from error
        if done < file.bytes or changed:
            raise StorageError(f"{file.path} was changed while it was in use; run again to make it anew")

    def _fill(self, descriptor: int, into: memoryview) -> int:
        """Read a file from its beginning on, and give how many bytes there were of it."""
        done = 0
        while done < len(into) and done % PAGE == 0:  # what ends inside a page ends the file
            try:
                count = os.preadv(descriptor, [into[done:]], done)
            except OSError as error:
                if error.errno != errno.EINVAL or not _read_through_cache(descriptor):
                    raise
                self.direct = False
                continue
            if count == 0:
                break
            done += count
        return done


class HostSource:
    """The same bytes, held in memory: for sublayers that are brought to another device, and for comparisons.

    Raises:
        StorageError: a file cannot be read.
    """

    def __init__(self, files: Sequence[SublayerFile], pinned: bool = False) -> None:
        self.tensors: list[Tensor] = []
        disk = DiskSource(files)
        for position, file in enumerate(files):
            aligned = aligned_buffer(file.bytes)
            disk.read(position, bytes_of_tensor(aligned))
            self.tensors.append(aligned.pin_memory() if pinned else aligned)

    def read(self, position: int, into: memoryview) -> None:
        tensor = self.tensors[position]
        torch.frombuffer(into, dtype=torch.uint8)[: len(tensor)].copy_(tensor)


class Throttled:
    """A source that gives no more than so many bytes a second: a slower disk, simulated.

    Args:
        bytes_per_second: of the slower one.
    """

    def __init__(self, source: SublayerSource, bytes_per_second: float) -> None:
        self._source = source
        self._rate = bytes_per_second

    def read(self, position: int, into: memoryview) -> None:
        begin = time.monotonic()
        self._source.read(position, into)
        time.sleep(max(0.0, begin + len(into) / self._rate - time.monotonic()))


def aligned_buffer(count: int) -> Tensor:
    """Bytes from a whole page on: uint8, [count]."""
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


def _stamp(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _read_through_cache(descriptor: int) -> bool:
    """Whether a file was open for direct reads; it is no longer: some file systems open it so and refuse each read."""
    import fcntl  # of POSIX

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
    return bool(flags & DIRECT)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
