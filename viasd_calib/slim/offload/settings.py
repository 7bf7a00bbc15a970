"""How much of q is in memory, and where the rest lies."""

from __future__ import annotations

import os
import platform
from typing import NamedTuple, Self

from viasd_calib.choices import Backend, OffloadKind
from viasd_calib.errors import ModelError
from viasd_calib.option_types import Count, Positive, check_option
from viasd_calib.spec import OffloadRef


class Offload(NamedTuple):
    """Where q's layers stay that q' does not run.

    Attributes:
        kind: on disk, or in the host's memory.
        memory: bytes that weights may take in the memory of the device: what q' runs, embeddings, norms, the head, two
            buffers, and as many of q's layers as fit beside them; None for none of these layers.
        bytes_per_second: what reading is slowed down to, which simulates a slower disk; None for as fast as it is.
    """

    kind: OffloadKind = "disk"
    memory: int | None = None
    bytes_per_second: float | None = None

    @classmethod
    def of_spec(cls, entry: OffloadRef | None) -> Self | None:
        """What a spec says, as fast as reading is; None where it has all in memory."""
        return None if entry is None else cls(entry.kind, entry.memory)

    def entry(self) -> OffloadRef:
        """What a spec says of it: a simulation is none of its matter.

        Example:
            >>> Offload.of_spec(Offload("disk", 10**9, bytes_per_second=5e8).entry())
            Offload(kind='disk', memory=1000000000, bytes_per_second=None)
        """
        return OffloadRef(kind=self.kind, memory=self.memory)


def why_no_reading() -> str | None:
    """What reading layers for each pass lacks on this system, in words; None where it has all."""
    if hasattr(os, "preadv"):
        return None
    return f"Python reads no file into several buffers (os.preadv) on {platform.system()}"


def check_offload(offload: Offload, device: str, backend: Backend | None) -> None:
    """Refuse, before a model is loaded, what cannot be read for each pass.

    Args:
        device: of the verifier, as ``cuda:0``.
        backend: None where it is not chosen yet.

    Raises:
        ModelError: naming the mend.

    Example:
        >>> check_offload(Offload("disk"), "cpu", None)
    """
    check_option("offload", offload.kind, OffloadKind, ModelError)
    check_option("memory", offload.memory, Count | None, ModelError)
    check_option("bytes_per_second", offload.bytes_per_second, Positive | None, ModelError)
    lacking = why_no_reading()
    if lacking is not None:
        raise ModelError(
            f"--offload does not run here: {lacking}; use Linux, or on Windows its subsystem for Linux, or leave it out"
        )
    if backend == "compiled":
        raise ModelError("backend compiled cannot read layers for each pass; choose another for --offload")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ModelError(f"--offload runs on a CPU and on CUDA, not on {device}")
    if kind == "cuda" and (offload.kind == "disk" or offload.bytes_per_second is not None):
        raise ModelError("on CUDA cold layers lie in the host's memory, unthrottled: give --offload cpu")
