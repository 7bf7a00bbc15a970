"""How much of q is in memory, and where the rest lies."""

from __future__ import annotations

from typing import NamedTuple

from viasd_calib.choices import OffloadKind


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
