"""What numbers were measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
"""Where Linux says how large caches are."""
LARGE_CACHE = 64 * 2**20
"""Bytes that a last-level cache is taken to have where nothing says."""


def hardware(device: torch.device) -> dict[str, Any]:
    """Name of ``device``, cores and threads of the host, versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
    }


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache before a device's memory; ``LARGE_CACHE`` where nothing says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(path.read_text(encoding="ascii")) for path in CACHES.glob("index*/size")]
    return max(sizes, default=LARGE_CACHE)


def _bytes(words: str) -> int:
    """A size as Linux writes it, in bytes; 0 for what is none.

    Example:
        >>> _bytes("48K"), _bytes("33M")
        (49152, 34603008)
    """
    found = re.fullmatch(r"(\d+)([KM])", words.strip())
    return int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]] if found else 0


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as source:
            names = [line.split(":", 1)[1].strip() for line in source if line.startswith("model name")]
    except OSError:  # not a Linux machine
        names = []
    return names[0] if names else platform.processor() or platform.machine()
