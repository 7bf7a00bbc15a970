"""What the passes cost that decide where drafting stops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.tiny import TinyFolder, tiny_spec
from viasd_calib.decoding.engine import load_engine
from viasd_calib.pipeline.calibrate import measure_costs
from viasd_calib.profiling import measure
from viasd_calib.profiling.measure import Pass
from viasd_calib.profiling.profile import Measured, PassShape

SECONDS = {"draft": 0.5, "slim": 1.0, "full": 10.0}


def test_slim_passes_are_timed_beside_full_ones(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 1 to draft length + 1 tokens, each; the output head by itself is not."""

    def priced(passes: Mapping[PassShape, Pass], repeats: int, device: torch.device) -> list[Measured]:
        seconds = {shape: SECONDS[shape.tier] * shape.width for shape in passes}
        return [Measured(**shape._asdict(), seconds=one, low=one, high=one) for shape, one in seconds.items()]

    monkeypatch.setattr(measure, "time_passes", priced)
    costs = measure_costs(load_engine(tiny_spec(tiny_folder, tmp_path)), draft_length=2)
    assert (costs.draft_step, costs.slim, costs.full) == (0.5, [1, 2, 3], [10, 20, 30])
