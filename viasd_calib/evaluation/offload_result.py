"""What a benchmark says of memory, where q's layers are read for each of its passes, beside q alone in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from viasd_calib.choices import BenchMethod, OffloadKind
from viasd_calib.evaluation.metrics import MeasuredBatch
from viasd_calib.slim.offload.install import ColdSublayers

SPARED = 0.8
"""Share of the cold bytes that memory is to be smaller by at least: buffers take some of it."""


class OffloadResult(BaseModel):
    """What was in memory, and what was read for each pass of q.

    Attributes:
        resident_bytes: of weights in memory: what q' runs, embeddings, norms and head, buffers, layers that stay.
        cold_bytes: of q's weights that are read for each of its passes.
        cold_bytes_per_second: at which they were read, nothing else being done.
        bandwidth: what reading was slowed down to, in bytes a second; None for as fast as it is.
        peak_memory_bytes: of the process, by method; all methods share its weights.
        plain_peak_memory_bytes: of a process of its own that has all of q in memory, and nothing besides, and decodes
            with it; None where that was not measured.
        slim_bytes: of q' beside q's own weights, in memory.
        drafter_bytes: the same of the drafter.
    """

    model_config = ConfigDict(extra="forbid")

    kind: OffloadKind
    resident_bytes: int
    cold_bytes: int
    cold_bytes_per_second: float
    bandwidth: float | None = None
    peak_memory_bytes: dict[str, int]
    plain_peak_memory_bytes: int | None = None
    slim_bytes: int = 0
    drafter_bytes: int = 0

    def allowed_peak(self) -> int | None:
        """What the peak is to stay below: that of q alone less 80 % of the cold bytes, and what q' and drafter add.

        Example:
            >>> OffloadResult(
            ...     kind="disk",
            ...     resident_bytes=60,
            ...     cold_bytes=50,
            ...     cold_bytes_per_second=1e9,
            ...     peak_memory_bytes={},
            ...     plain_peak_memory_bytes=100,
            ...     slim_bytes=25,
            ...     drafter_bytes=5,
            ... ).allowed_peak()
            90
        """
        if self.plain_peak_memory_bytes is None:
            return None
        return int(self.plain_peak_memory_bytes - SPARED * self.cold_bytes) + self.slim_bytes + self.drafter_bytes


def offload_result(
    cold: ColdSublayers, results: Mapping[BenchMethod, Sequence[MeasuredBatch]], drafter_bytes: int
) -> OffloadResult:
    """What a benchmark says of an engine whose layers are read for each pass; q alone is measured elsewhere."""
    return OffloadResult(
        kind=cold.offload.kind,
        resident_bytes=cold.residency.resident_bytes,
        cold_bytes=cold.residency.cold_bytes,
        cold_bytes_per_second=cold.bytes_per_second(),
        bandwidth=cold.offload.bytes_per_second,
        peak_memory_bytes=peaks_of(results),
        slim_bytes=cold.slim_bytes,
        drafter_bytes=drafter_bytes,
    )


def peaks_of(results: Mapping[BenchMethod, Sequence[MeasuredBatch]]) -> dict[str, int]:
    """The most memory that the process took under each method; none of methods for which it is not known."""
    peaks = {name: [one.peak_bytes for one in rows if one.peak_bytes is not None] for name, rows in results.items()}
    return {name: max(found) for name, found in peaks.items() if found}
