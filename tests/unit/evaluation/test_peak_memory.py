"""The peak of memory is of what was held since it was begun."""

from __future__ import annotations

import sys

import pytest
import torch

from viasd_calib.evaluation.peak_memory import PeakMemory

HELD = 2**26
"""Bytes: far more than what an interpreter takes besides in so short a time."""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells the peak")
def test_what_was_held_before_is_not_counted() -> None:
    before = torch.ones(HELD, dtype=torch.uint8)
    del before
    first = PeakMemory(torch.device("cpu")).bytes()
    measured = PeakMemory(torch.device("cpu"))
    held = torch.ones(2 * HELD, dtype=torch.uint8)
    peak = measured.bytes()
    del held
    again = PeakMemory(torch.device("cpu")).bytes()
    if first is None or peak is None or again is None:
        pytest.skip("this kernel does not let a process begin its peak anew")
    assert peak - first > HELD / 2  # the allocator may keep what was freed, and use it again
    assert peak - again > HELD / 2
