"""The peak of memory of q alone, with all of it in memory, in a process of its own.

In the process of a benchmark it cannot be measured: that has a slim verifier and a drafter, and q only in part.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from viasd_calib.choices import Backend
from viasd_calib.decoding.engine import assemble
from viasd_calib.errors import MachineWarning
from viasd_calib.evaluation.peak_memory import PeakMemory
from viasd_calib.models import load_verifier
from viasd_calib.spec import DType, Gates, PromptLookupDraft, Route, RoutingSpec

ROOM = 2.5
"""Free memory that is asked for, over the bytes of the weights: a backend packs them beside the plain ones."""
AVAILABLE = Path("/proc/meminfo")


class PlainRun(BaseModel):
    """What the other process is to do: load q and decode one text.

    Attributes:
        verifier: hub id, folder or file.
        device: of its weights.
        prompt: token ids.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verifier: str
    dtype: DType
    device: str
    backend: Backend
    prompt: list[int]
    max_new_tokens: int


class _Answer(BaseModel):
    peak_bytes: int | None


def plain_peak(run: PlainRun, weight_bytes: int) -> int | None:
    """Bytes at the peak of decoding with q alone; None, with a warning, where that cannot be measured.

    Args:
        weight_bytes: of q, for which memory must be free: nothing is loaded that would have others killed.
    """
    free = free_bytes(torch.device(run.device))
    if free is not None and free < ROOM * weight_bytes:
        _unmeasured(f"{free:,} bytes of memory are free, and it takes {int(ROOM * weight_bytes):,}")
        return None
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    done = subprocess.run(command, input=run.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        _unmeasured(said[-1] if said else f"its process ended with {done.returncode}")
        return None
    return _Answer.model_validate_json(done.stdout.splitlines()[-1]).peak_bytes


def _unmeasured(why: str) -> None:
    warnings.warn(f"the verifier alone in memory was not measured: {why}", MachineWarning, stacklevel=3)


def free_bytes(device: torch.device) -> int | None:
    """Memory that may be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not AVAILABLE.exists():
        return None
    for line in AVAILABLE.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def measure(run: PlainRun) -> int | None:
    """Load q with all of its layers and nothing besides, and give the peak of decoding one text."""
    import_module("viasd_calib.evaluation.bench")  # code takes memory too: as much as in a benchmark's process
    loaded = load_verifier(run.verifier, dtype=run.dtype, device=run.device)
    never = Gates(convention="ratio", accept_at=1.01, escalate_below=1.005)
    spec = RoutingSpec(verifier=loaded.ref, draft=PromptLookupDraft(), route=Route(), gates=never)
    engine = assemble(spec, Path(), loaded, backend=run.backend)
    decoder = engine.decoder("autoregressive")
    decoder.generate(run.prompt, max_new_tokens=1)
    peak = PeakMemory(engine.routed.device)
    decoder.generate(run.prompt, max_new_tokens=run.max_new_tokens)
    return peak.bytes()


if __name__ == "__main__":
    print(_Answer(peak_bytes=measure(PlainRun.model_validate_json(sys.stdin.read()))).model_dump_json())
