"""The most memory that this process has taken since it was last asked."""

from __future__ import annotations

import re
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux is told to begin the peak of resident memory anew."""
SLACK = 2**24
"""Bytes that a peak begun anew may lie above what is held: Linux counts pages of each thread in batches."""


class PeakMemory:
    """Begins a measurement of the process's resident memory, or of what PyTorch holds on a CUDA device.

    Args:
        device: where weights are.

    Example:
        >>> measured = PeakMemory(torch.device("cpu"))
        >>> held = torch.ones(2**20)
        >>> measured.bytes() is None or measured.bytes() > held.nbytes
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measured = device.type == "cuda" or _reset()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """The peak since then; None where the system cannot say."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._measured:
            return None
        return _of_process("VmHWM")


def _reset() -> bool:
    """Begin anew; whether it was: some kernels take the request and leave the peak as it was."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    peak, held = _of_process("VmHWM"), _of_process("VmRSS")
    return peak is not None and held is not None and peak <= held + SLACK


def _of_process(name: str) -> int | None:
    """Bytes of memory that Linux says of this process under a name; None where it does not."""
    if not STATUS.exists():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
