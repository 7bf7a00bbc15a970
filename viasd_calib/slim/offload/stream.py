"""Two buffers through which q's cold sublayers pass: one is read while the other is in use."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from viasd_calib.errors import ModelError
from viasd_calib.slim.in_process import InProcess
from viasd_calib.slim.offload.layer_files import bytes_of_tensor
from viasd_calib.slim.offload.reading import SublayerSource, aligned_buffer

BUFFERS = 2


class SublayerStream(Protocol):
    """Cold sublayers that come to memory when they are needed."""

    def buffer(self, position: int) -> Tensor:
        """Where a cold sublayer's bytes lie while it is in use: uint8.

        Args:
            position: of the sublayer among the cold ones.
        """
        ...

    def take(self, position: int) -> None:
        """Wait until a sublayer's bytes are in its buffer, and hold them there; a thread has one at a time.

        Raises:
            StorageError: they cannot be read, or are no longer what they were.
        """
        ...

    def give_back(self) -> None:
        """Free the buffer of the sublayer that this thread has taken; nothing where it has none."""
        ...


class OneAtATime(InProcess, ABC):
    """A stream of which one thread at a time has one sublayer; a thread that wants one waits for the other thread.

    A forward that is interrupted (Ctrl-C) may not give its sublayer back: it is, where its thread takes the next one.
    """

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        self._owner: int | None = None

    def take(self, position: int) -> None:
        self.give_back()
        self._in_use.acquire()
        self._owner = threading.get_ident()
        try:
            self._bring(position)
        except BaseException:
            self._owner = None
            self._in_use.release()
            raise

    def give_back(self) -> None:
        if self._owner != threading.get_ident():
            return
        self._free()
        self._owner = None
        self._in_use.release()

    @abstractmethod
    def _bring(self, position: int) -> None:
        """Have a sublayer's bytes in its buffer."""

    @abstractmethod
    def _free(self) -> None:
        """Let another one come to the buffer of the sublayer that was brought last; nothing where it may already."""


class HostStream(OneAtATime):
    """A stream on the CPU: a thread reads ahead, in the order of the sublayers, and from the last on to the first.

    They may be taken in any order; those out of order are waited for longer. What cannot be read ahead is read once
    more when it is asked for: only then is the error raised.

    Args:
        source: of their bytes.
        sizes: bytes of each.
    """

    def __init__(self, source: SublayerSource, sizes: Sequence[int]) -> None:
        super().__init__()
        self._buffers = [aligned_buffer(max(sizes)) for _ in range(min(BUFFERS, len(sizes)))]
        self._shared = _Shared(source, sizes, [bytes_of_tensor(one) for one in self._buffers])
        # Not given the stream itself, which could then never be collected.
        self._thread = threading.Thread(target=_read_ahead, args=(self._shared,), daemon=True, name="sublayers")
        self._thread.start()
        weakref.finalize(self, _end, self._shared, self._thread)

    def buffer(self, position: int) -> Tensor:
        return self._buffers[position % len(self._buffers)]

    def _bring(self, position: int) -> None:
        if not self._thread.is_alive():
            raise ModelError("the thread that reads layers is not in this process: call load_engine in each process")
        self._shared.wait_for(position)

    def _free(self) -> None:
        self._shared.free()


class _Shared:
    """What the reading thread and those that it reads for both see; the latter are one at a time."""

    def __init__(self, source: SublayerSource, sizes: Sequence[int], buffers: Sequence[memoryview]) -> None:
        self.source = source
        self.sizes = sizes
        self.buffers = buffers
        self.changed = threading.Condition()
        self.held: list[int | None] = [None] * len(buffers)
        """The sublayer in each buffer."""
        self.taken: int | None = None
        self.next = 0
        """The one that is read next, or that is being read."""
        self.stopped = False
        self.error: Exception | None = None
        """Why ``next`` could not be read; the thread reads no more until it is asked for one again."""

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def wait_for(self, position: int) -> None:
        with self.changed:
            asked = False
            while self.held[position % len(self.buffers)] != position:
                if self.error is not None and asked and self.next == position:
                    raise self.error
                if self.error is not None or position not in self._coming():
                    self.error = None
                    self.next = position
                    self.held = [None] * len(self.buffers)
                    self.changed.notify_all()
                asked = True
                self.changed.wait()
            self.taken = position

    def free(self) -> None:
        with self.changed:
            if self.taken is not None:
                self.held[self.taken % len(self.buffers)] = None
                self.taken = None
                self.changed.notify_all()

    def _coming(self) -> set[int]:
        """Those that will be read before any buffer has to be freed."""
        count, coming = len(self.sizes), set[int]()
        free = {number for number, held in enumerate(self.held) if held is None}
        position = self.next
        while position % len(self.buffers) in free:
            free.remove(position % len(self.buffers))
            coming.add(position)
            position = (position + 1) % count
        return coming

    def work(self) -> tuple[int, memoryview] | None:
        """Wait for a buffer that is free for the next layer; None where no more is to be read."""
        with self.changed:
            while not self.stopped and (self.error is not None or self.held[self.next % len(self.buffers)] is not None):
                self.changed.wait()
            if self.stopped:
                return None
            return self.next, self.buffers[self.next % len(self.buffers)][: self.sizes[self.next]]

    def done(self, position: int, error: Exception | None) -> None:
        with self.changed:
            if position == self.next:  # else another one was asked for meanwhile
                self.error = error
                if error is None:
                    self.held[position % len(self.buffers)] = position
                    self.next = (position + 1) % len(self.sizes)
            self.changed.notify_all()


def _read_ahead(shared: _Shared) -> None:
    """What the thread does until it is stopped."""
    while (work := shared.work()) is not None:
        position, into = work
        try:
            shared.source.read(position, into)
        except Exception as error:
            shared.done(position, error)
        else:
            shared.done(position, None)


def _end(shared: _Shared, thread: threading.Thread) -> None:
    """Stop the reading thread and wait for its end, which is that of one read.

    At the end of the process too: a thread that comes back from a read while the interpreter is being finalized is
    ended by it, and may take the whole process with it.
    """
    shared.stop()
    if thread is not threading.current_thread() and thread.is_alive():  # in a process that was forked it is not
        thread.join()


@contextmanager
def taken(stream: SublayerStream, position: int) -> Iterator[None]:
    """Have a sublayer's weights in memory for as long as the block lasts."""
    stream.take(position)
    try:
        yield
    finally:
        stream.give_back()
