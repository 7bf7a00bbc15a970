"""What numbers were measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch


def hardware(device: torch.device) -> dict[str, Any]:
    """Name of ``device``, cores and threads of the host, versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as source:
            names = [line.split(":", 1)[1].strip() for line in source if line.startswith("model name")]
    except OSError:  # not a Linux machine
        names = []
    return names[0] if names else platform.processor() or platform.machine()
