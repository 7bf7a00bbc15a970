"""Copies to a CUDA device: in an order that no pass can see, on a device that notes what is queued on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from viasd_calib.slim.offload.cuda_stream import CudaStream
from viasd_calib.slim.offload.stream import taken


class FakeStream:
    """Does not wait: everything is done at once, so that order is all there is to see."""

    def __init__(self, *_: object) -> None:
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)

    def wait_event(self, event: FakeEvent) -> None:
        assert event.recorded_on is not None, "nothing would be waited for"
        self.waited.append(event)


class FakeEvent:
    recorded_on: object = None

    def record(self, stream: object) -> None:
        self.recorded_on = stream


@pytest.fixture(scope="module", autouse=True)
def fake_cuda() -> Iterator[FakeStream]:
    current = FakeStream()

    @contextmanager
    def on(_: object) -> Iterator[None]:
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", FakeStream)
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "current_stream", lambda _: current)
        yield current


def make(count: int) -> CudaStream:
    sources = [torch.full((1 + position % 3,), position, dtype=torch.uint8) for position in range(count)]
    return CudaStream(sources, torch.device("cpu"))


@given(
    case=st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=20))),
    passes=st.integers(0, 3),
)
def test_every_order_sees_the_right_bytes(case: tuple[int, list[int]], passes: int) -> None:
    count, order = case
    stream = make(count)
    for position in [*order, *[*range(count)] * passes, *order]:
        with taken(stream, position):
            assert stream.buffer(position)[: 1 + position % 3].eq(position).all()


def test_copies_wait_for_passes_and_passes_for_copies(fake_cuda: FakeStream) -> None:
    stream = make(3)
    fake_cuda.waited.clear()
    with taken(stream, 0):
        assert fake_cuda.waited == [stream._filled[0]]
        before = len(stream._copies.waited)  # type: ignore[attr-defined]
    assert stream._copies.waited[before:] == [fake_cuda]  # type: ignore[attr-defined]


def test_the_next_pass_is_copied_ahead() -> None:
    """After the last sublayers the first ones are there, in whichever buffer, and in order nothing is copied twice."""
    for count in (1, 2, 3, 4, 5):
        stream = make(count)
        for _ in range(3):
            for position in range(count):
                assert stream._held[position % len(stream._buffers)] == position
                with taken(stream, position):
                    pass
