"""Where a spec's policy expects the verifier's layers."""

from __future__ import annotations

from pydantic import Field

from viasd_calib.choices import OffloadKind
from viasd_calib.schema.base import SpecModel


class OffloadRef(SpecModel):
    """Layers that the slim verifier does not run, read for each pass of the full one: what decoding was timed with."""

    kind: OffloadKind = Field(description="where they lie: on disk, or in the host's memory")
    memory: int | None = Field(
        None, gt=0, description="bytes that weights may take in the device's memory; null for as few as can be"
    )
