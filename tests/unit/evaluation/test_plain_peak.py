"""The peak of memory of q alone, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.offload_cases import save_verifier
from viasd_calib.cli.bench import describe_memory
from viasd_calib.errors import MachineWarning
from viasd_calib.evaluation import plain_peak as module
from viasd_calib.evaluation.bench import BenchResult, BenchSettings
from viasd_calib.evaluation.offload_result import OffloadResult
from viasd_calib.evaluation.peak_memory import PeakMemory
from viasd_calib.evaluation.plain_peak import PlainRun, free_bytes, plain_peak

MEMORY = OffloadResult(
    kind="disk", resident_bytes=200_000_000, cold_bytes=200_000_000, cold_bytes_per_second=1e9,
    peak_memory_bytes={"autoregressive": 690_000_000, "three_tier": 700_000_000},
    plain_peak_memory_bytes=800_000_000, slim_bytes=90_000_000, drafter_bytes=10_000_000,
)  # fmt: skip


def run(folder: Path) -> PlainRun:
    return PlainRun(
        verifier=str(folder), dtype="float32", device="cpu", backend="eager", prompt=[7, 8, 9], max_new_tokens=4
    )


def test_it_is_that_of_another_process(tmp_path: Path) -> None:
    """What this one holds is not in it, and what that one holds is."""
    if PeakMemory(torch.device("cpu")).bytes() is None:
        pytest.skip("this kernel does not let a process begin its peak anew")
    held = torch.ones(2**30, dtype=torch.uint8)
    small = plain_peak(run(save_verifier(tmp_path / "q")), 1)
    own = PeakMemory(torch.device("cpu")).bytes()
    assert held.numel() == 2**30
    assert small is not None
    assert own is not None
    assert small < own - 2**29
    large = save_verifier(tmp_path / "large", intermediate_size=100_000)  # 4 layers of 77 MB
    found = plain_peak(run(large), 1)
    assert found is not None
    assert 2e8 < found - small < 8e8


def test_nothing_is_loaded_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   2000 kB\n")
    monkeypatch.setattr(module, "AVAILABLE", tmp_path / "meminfo")
    assert free_bytes(torch.device("cpu")) == 2_048_000
    with pytest.warns(MachineWarning, match="not measured: 2,048,000 bytes of memory are free, and it takes 2,500,000"):
        assert plain_peak(run(tmp_path / "nowhere"), 1_000_000) is None


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.warns(MachineWarning, match=r"not measured: .*nowhere"):
        assert plain_peak(run(tmp_path / "nowhere"), 1) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "with 90.0 of the slim verifier and 10.0 of the drafter, that is 740.0: the peak is below it"),
        ({"drafter_bytes": 0, "slim_bytes": 20_000_000}, "that is 660.0: the peak is above it"),
        ({"plain_peak_memory_bytes": None}, "peak of memory: 700.0 MB (three_tier)"),
    ],
)
def test_it_is_printed_beside_what_it_is_to_stay_below(changes: dict[str, int | None], words: str) -> None:
    settings = BenchSettings(methods=[], max_new_tokens=1, dtype="float32", audit="strict", seed=0)
    result = BenchResult(
        hardware={}, settings=settings, n_prompts=1, methods={}, by_task={}, offload=MEMORY.model_copy(update=changes)
    )
    (line,) = describe_memory(result)
    assert line.endswith(words)
    assert describe_memory(result.model_copy(update={"offload": None})) == []
