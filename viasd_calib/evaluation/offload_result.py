"""What a benchmark says of memory, where q's layers are read for each of its passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from viasd_calib.choices import BenchMethod, OffloadKind
from viasd_calib.evaluation.metrics import PromptResult
from viasd_calib.slim.offload.install import ColdSublayers


class OffloadResult(BaseModel):
    """What was in memory, and what was read for each pass of q.

    Attributes:
        resident_bytes: of weights in memory: what q' runs, embeddings, norms and head, buffers, layers that stay.
        cold_bytes: of q's weights that are read for each of its passes.
        cold_bytes_per_second: at which they were read, nothing else being done.
        bandwidth: what reading was slowed down to, in bytes a second; None for as fast as it is.
        peak_memory_bytes: of the process, by method; all methods share its weights.
    """

    model_config = ConfigDict(extra="forbid")

    kind: OffloadKind
    resident_bytes: int
    cold_bytes: int
    cold_bytes_per_second: float
    bandwidth: float | None = None
    peak_memory_bytes: dict[str, int]


def offload_result(cold: ColdSublayers, results: Mapping[BenchMethod, Sequence[PromptResult]]) -> OffloadResult:
    """What a benchmark says of an engine whose layers are read for each pass."""
    peaks = {name: [one.peak_bytes for one in rows if one.peak_bytes is not None] for name, rows in results.items()}
    return OffloadResult(
        kind=cold.offload.kind,
        resident_bytes=cold.residency.resident_bytes,
        cold_bytes=cold.residency.cold_bytes,
        cold_bytes_per_second=cold.bytes_per_second(),
        bandwidth=cold.offload.bytes_per_second,
        peak_memory_bytes={name: max(found) for name, found in peaks.items() if found},
    )
