"""What the record says of the machine and of the source."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from viasd_calib.hardware import hardware

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "gguf", "scipy")
ROOT = Path(__file__).parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, memory in bytes, and versions."""
    found: dict[str, Any] = {**hardware(device), "versions": {name: _version(name) for name in PACKAGES}}
    found["cuda"], found["driver"] = torch.version.cuda, driver()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["memory"] = properties.total_memory
        found["processors"] = properties.multi_processor_count
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    if shutil.which("nvidia-smi") is not None:
        said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if said:
            return said.splitlines()[0]
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None


def commit() -> str | None:
    """The commit of the source, with ``-dirty`` where files differ from it; None outside a git repository."""
    return None if shutil.which("git") is None else _output("git", "describe", "--always", "--abbrev=40", "--dirty")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
