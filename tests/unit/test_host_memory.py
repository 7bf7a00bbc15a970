"""Memory that the C library keeps of what was freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from viasd_calib import host_memory

GAPS = """
import ctypes
from pathlib import Path
import torch
from viasd_calib.host_memory import give_freed_memory_back, keep_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

assert keep_freed_memory()
stay = []
for _ in range(100):
    gone = torch.ones(2**20)
    stay.append(torch.ones(2**12))
    big = [torch.ones(2**18) for _ in range(4)]
    stay.append(torch.ones(2**12))
everything = [torch.ones(2**20) for _ in range(30)]
del gone, big, everything
before = resident()
print(give_freed_memory_back(), before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux")
def test_freed_memory_is_given_back_though_it_is_kept() -> None:
    """The command line lets it be kept; what was freed between tensors that stay is given back all the same."""
    if host_memory._of_glibc("malloc_trim") is None:
        pytest.skip("the C library is not glibc")
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    gave, count = done.stdout.split()
    assert gave == "True"
    assert int(count) > 50 * 2**20


def test_another_c_library_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not host_memory.give_freed_memory_back()
    assert not host_memory.keep_freed_memory()


BACK = """
from pathlib import Path
import torch
from viasd_calib.host_memory import SMALL, freed_memory_goes_back, keep_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

def left():
    before = resident()
    gone = [torch.ones(SMALL) for _ in range(6)]  # 4 bytes each
    stays = torch.ones(2**12)
    del gone
    return resident() - before, stays

with freed_memory_goes_back():  # nothing was kept before
    pass
assert keep_freed_memory()
with freed_memory_goes_back():
    back, one = left()
kept, other = left()
print(back, kept)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux")
def test_freed_memory_goes_back_at_once_within_the_block_alone() -> None:
    if host_memory._of_glibc("mallopt") is None:
        pytest.skip("the C library is not glibc")
    done = subprocess.run([sys.executable, "-c", BACK], capture_output=True, text=True, check=True)
    back, kept = map(int, done.stdout.split())
    assert back < 2**25, "blocks of 200 MB in all were freed"
    assert kept > 2**26
