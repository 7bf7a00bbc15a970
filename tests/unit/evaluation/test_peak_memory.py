"""The peak of memory is of what was held since it was begun."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from viasd_calib.evaluation import peak_memory
from viasd_calib.evaluation.peak_memory import PeakMemory

HELD = 2**26
"""Bytes: far more than what an interpreter takes besides in so short a time."""


def peak_of(size: int) -> int | None:
    """The peak while so many bytes are held, which are the system's own pages: allocators keep what is freed."""
    measured = PeakMemory(torch.device("cpu"))
    with mmap.mmap(-1, size) as held:
        held.write(bytes(size // 2))
        held.write(bytes(size // 2))
        return measured.bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells the peak")
def test_what_was_held_before_is_not_counted() -> None:
    peak_of(2 * HELD)  # what its own objects take is kept from here on
    least, peak, again = peak_of(HELD // 16), peak_of(2 * HELD), peak_of(HELD // 16)
    if least is None or peak is None or again is None:
        pytest.skip("this kernel does not let a process begin its peak anew")
    assert peak - least > HELD / 2
    assert peak - again > HELD / 2


@pytest.mark.parametrize(("peak", "known"), [(2_000_000, False), (1_000_100, True)])
def test_a_peak_that_the_kernel_leaves_as_it_was_says_nothing(
    peak: int, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status").write_text(f"VmHWM:\t {peak} kB\nVmRSS:\t 1000000 kB\n")
    monkeypatch.setattr(peak_memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(peak_memory, "CLEAR", tmp_path / "clear")
    assert PeakMemory(torch.device("cpu")).bytes() == (peak * 1024 if known else None)
