"""Two buffers and a thread that reads ahead: the right bytes in any order, errors where they are waited for."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.errors import ModelError, StorageError
from viasd_calib.slim.offload.layer_files import PAGE
from viasd_calib.slim.offload.stream import HostStream, taken

WAIT = 20.0
"""Seconds after which a test says that a thread waits for ever."""


class FakeSource:
    """Fills a sublayer's bytes with its position.

    Attributes:
        failures: how often each is still to fail.
    """

    def __init__(self, failures: dict[int, int] | None = None, pause: float = 0.0) -> None:
        self.failures = failures or {}
        self.pause = pause
        self.reads: list[int] = []

    def read(self, position: int, into: memoryview) -> None:
        self.reads.append(position)
        into[: len(into) // 2] = bytes([position + 1]) * (len(into) // 2)
        time.sleep(self.pause)
        if self.failures.get(position, 0):
            self.failures[position] -= 1
            raise StorageError(f"no {position}")
        into[:] = bytes([position + 1]) * len(into)


def sizes(count: int) -> list[int]:
    return [PAGE * (1 + position % 3) for position in range(count)]


def check(stream: HostStream, position: int, size: int) -> None:
    """Take one, see its bytes, also a moment later, and give it back."""
    with taken(stream, position):
        found = stream.buffer(position)[:size]
        assert found.eq(position + 1).all()
        time.sleep(0)
        assert found.eq(position + 1).all()


def taken_well(stream: HostStream, position: int, size: int) -> bool:
    """Whether one could be taken; if not, it is the one that the error is of."""
    failed = re.compile(f"no {position}")
    try:
        check(stream, position, size)
    except StorageError as error:
        return not failed.fullmatch(str(error)) and pytest.fail(f"{error} is of another than {position}")
    return True


def within(seconds: float, *jobs: Callable[[], Any]) -> None:
    """Run each job in a thread of its own; all end in time, and the first error of them is raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]


orders = st.integers(1, 6).flatmap(
    lambda count: st.tuples(st.just(count), st.lists(st.integers(0, count - 1), max_size=30))
)


@given(case=orders, passes=st.integers(0, 3))
def test_every_order_sees_the_right_bytes(case: tuple[int, list[int]], passes: int) -> None:
    count, order = case
    stream = HostStream(FakeSource(), sizes(count))

    def run() -> None:
        for position in [*order, *[*range(count)] * passes, *order]:
            check(stream, position, sizes(count)[position])

    within(WAIT, run)


@given(case=orders, failures=st.dictionaries(st.integers(0, 5), st.integers(1, 4), max_size=3))
def test_errors_come_where_they_are_waited_for(case: tuple[int, list[int]], failures: dict[int, int]) -> None:
    """Every error is of the sublayer that is taken, and after it the same one can be taken once it can be read."""
    count, order = case
    source = FakeSource(dict(failures))
    stream = HostStream(source, sizes(count))

    def run() -> None:
        for position in [*order, *range(count)]:
            while not taken_well(stream, position, sizes(count)[position]):
                pass

    within(WAIT, run)


def test_it_reads_ahead_in_the_order_of_the_passes() -> None:
    """Nothing is read twice, from the last sublayer on to the first."""
    source = FakeSource()
    stream = HostStream(source, sizes(3))

    def run() -> None:
        for position in [0, 1, 2] * 3:
            check(stream, position, sizes(3)[position])

    within(WAIT, run)
    assert source.reads[:9] == [0, 1, 2] * 3


def test_an_error_long_past_is_forgotten() -> None:
    """What failed ahead of time, and can be read by now, is no error."""
    source = FakeSource({0: 1})
    stream = HostStream(source, sizes(2))
    within(WAIT, lambda: wait_until(lambda: source.failures[0] == 0))
    within(WAIT, lambda: check(stream, 0, sizes(2)[0]))


def test_an_error_that_stays_is_raised_at_each_take() -> None:
    stream = HostStream(FakeSource({1: 10**6}), sizes(3))

    def run() -> None:
        for _ in range(3):
            check(stream, 0, sizes(3)[0])
            with pytest.raises(StorageError, match="no 1"):
                stream.take(1)
            check(stream, 2, sizes(3)[2])

    within(WAIT, run)


def test_the_thread_rests_after_an_error() -> None:
    """It does not read the same again and again until it is asked for."""
    source = FakeSource({0: 10**6})
    stream = HostStream(source, sizes(1))

    def run() -> None:
        with pytest.raises(StorageError):
            stream.take(0)

    within(WAIT, run)
    before = len(source.reads)
    time.sleep(0.05)
    assert len(source.reads) == before <= 2


def wait_until(found: Callable[[], bool]) -> None:
    while not found():
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_threads_wait_for_each_other(count: int) -> None:
    """Two threads that pass through the layers at once each see their own, whole for as long as they hold it."""
    stream = HostStream(FakeSource(pause=0.0002), sizes(count))

    def passes(order: Sequence[int]) -> None:
        for position in order:
            with taken(stream, position):
                for _ in range(3):
                    assert stream.buffer(position)[: sizes(count)[position]].eq(position + 1).all()
                    time.sleep(0.0001)

    forward = [*range(count)] * 8
    within(WAIT, lambda: passes(forward), lambda: passes(forward), lambda: passes(forward[::-1]))


def test_giving_back_what_another_thread_holds_does_nothing() -> None:
    stream = HostStream(FakeSource(), sizes(3))
    stream.take(0)
    within(WAIT, stream.give_back)
    assert stream.buffer(0)[:PAGE].eq(1).all()
    waiting = threading.Thread(target=check, args=(stream, 2, sizes(3)[2]), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    assert stream.buffer(0)[:PAGE].eq(1).all()
    stream.give_back()
    waiting.join(WAIT)
    assert not waiting.is_alive()


def test_what_was_never_given_back_is_by_the_next_take() -> None:
    """An interrupted forward does not stop its thread for ever."""
    stream = HostStream(FakeSource(), sizes(3))

    def run() -> None:
        stream.take(0)
        check(stream, 1, sizes(3)[1])
        stream.give_back()
        check(stream, 0, sizes(3)[0])

    within(WAIT, run, run)


def test_an_error_inside_the_block_gives_back() -> None:
    stream = HostStream(FakeSource(), sizes(2))

    def run() -> None:
        with pytest.raises(ValueError, match="inside"), taken(stream, 1):
            raise ValueError("inside")

    within(WAIT, run)
    within(WAIT, lambda: check(stream, 1, sizes(2)[1]))  # by another thread


def test_the_thread_ends_with_the_stream() -> None:
    stream = HostStream(FakeSource(), sizes(3))
    thread = stream._thread
    check(stream, 0, sizes(3)[0])
    assert thread.is_alive()
    del stream
    gc.collect()
    thread.join(WAIT)
    assert not thread.is_alive()


def test_the_end_of_the_stream_waits_for_a_read() -> None:
    """A thread that came back from one while the interpreter is finalized could end the process with an abort."""
    source = FakeSource(pause=0.3)
    stream = HostStream(source, sizes(5))
    thread = stream._thread
    check(stream, 0, sizes(5)[0])
    read = len(source.reads)
    del stream
    gc.collect()
    assert not thread.is_alive()
    assert len(source.reads) <= read + 1, "the one that had begun, and no other"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_told_to_load_its_own() -> None:
    """Its copy of the stream has no thread: it would wait for ever."""
    stream = HostStream(FakeSource(), sizes(5))
    within(WAIT, lambda: check(stream, 0, sizes(5)[0]))
    child = os.fork()
    if child == 0:
        try:
            stream.take(3)
        except ModelError:
            os._exit(7)
        os._exit(8)
    ended: list[int] = []
    within(WAIT, lambda: ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    assert ended == [7]
