"""Two buffers on a CUDA device, filled from pinned host memory beside the computation, without a wait of the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viasd_calib.slim.offload.stream import BUFFERS, OneAtATime


class CudaStream(OneAtATime):
    """A stream on CUDA: copies run on a stream of their own, and events order them with the passes that read them.

    All threads that run passes have the same current stream, as they have unless told otherwise.

    Args:
        sources: bytes of each sublayer, pinned.
    """

    def __init__(self, sources: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        self._sources = sources
        self._device = device
        count = min(BUFFERS, len(sources))
        longest = max(len(one) for one in sources)
        self._buffers = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(count)]
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(count)]
        self._held: list[int | None] = [None] * count
        self._taken: int | None = None
        for position in range(count):
            self._fill(position)

    def buffer(self, position: int) -> Tensor:
        return self._buffers[position % len(self._buffers)]

    def _bring(self, position: int) -> None:
        number = position % len(self._buffers)
        if self._held[number] != position:  # out of order
            self._fill(position)
        torch.cuda.current_stream(self._device).wait_event(self._filled[number])
        self._taken = position

    def _free(self) -> None:
        if self._taken is None:
            return
        position, self._taken = self._taken, None
        following = position + len(self._buffers)
        self._fill(following if following < len(self._sources) else position % len(self._buffers))

    def _fill(self, position: int) -> None:
        """Copy a sublayer to its buffer once all that was queued before has read it."""
        number = position % len(self._buffers)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            source = self._sources[position]
            self._buffers[number][: len(source)].copy_(source, non_blocking=True)
            self._filled[number].record(self._copies)
        self._held[number] = position
