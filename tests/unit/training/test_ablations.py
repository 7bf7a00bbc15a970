"""The script after the table of ablations, on a tiny verifier."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import TinyFolder, tiny_traces
from tests.tiny.bits import priced
from viasd_calib.errors import JobWarning
from viasd_calib.file_names import FIT_FILE
from viasd_calib.pipeline.options import SearchOptions
from viasd_calib.pipeline.search import search
from viasd_calib.prompts import SplitShares
from viasd_calib.slim.parts import low_bit

SCRIPT = Path(__file__).parents[3] / "train" / "ablations.py"
SHARES = {"fit": 1.0, "calibrate": 0.0, "test": 0.0}


@pytest.fixture
def run(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, int], dict[str, Any]]:
    """Runs the script for some variants, compared on so many texts; what it wrote."""
    monkeypatch.chdir(tmp_path)
    traces = tiny_traces(tiny_folder, tmp_path / "traces", 24, max_new_tokens=12, batch_size=12)
    found, config, out = tmp_path / "search.json", tmp_path / "fit.yaml", tmp_path / "out"
    shares = SplitShares.model_validate(SHARES)
    search(
        SearchOptions(
            traces=str(traces), json=str(found), target_cost=0.8, methods="span,even", shares=shares,
            validation_share=0.3,
        )
    )  # fmt: skip
    common = {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        "model": {"verifier": str(tiny_folder), "bridge_texts": 6, "adapter_rank": 2, "max_run": 3},
        "data": {"folders": [str(traces)], "shares": SHARES, "validation_share": 0.3, "max_batch_tokens": 64},
    }
    config.write_text(yaml.safe_dump(common), encoding="utf-8")

    def run(only: str, limit: int) -> dict[str, Any]:
        words = ["--config", str(config), "--search", str(found), "--judge", str(traces), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, "--limit", str(limit), "--only", only])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        rows: dict[str, Any] = yaml.safe_load((out / "ablations.json").read_text(encoding="utf-8"))["rows"]
        return rows

    return run


def test_variants_are_trained_and_compared_once(
    run: Callable[[str, int], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    routes = run("route by", 5)
    assert [*routes] == ["route by even", "route by gates"]
    assert all(0 <= row[name] <= 1 for row in routes.values() for name in ("agreement", "confident", "pending"))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"out/*/{FIT_FILE}")}
    both = run("", 5)
    assert {name: both[name] for name in routes} == routes
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "bridge in closed form" in capsys.readouterr().out
    assert both["bridge in closed form"]["kl"] != both["nothing trained, no bridge"]["kl"]
    assert all(row["cost"] > 0 for row in both.values())
    low = ["bridge in closed form, the rest in 8 bits", "bridge and adapter, the rest in 8 bits", "all in 8 bits"]
    low += ["MLPs in 4 bits, the rest in 8", "MLPs in 4 bits by GPTQ, the rest in 8", "bits chosen"]
    assert [*both][-len(low) :] == low
    assert both["all in 8 bits"]["kl"] < both["MLPs in 4 bits, the rest in 8"]["kl"]
    assert both["all in 8 bits"]["kl"] < both["bridge in closed form, the rest in 8 bits"]["kl"]


def test_bits_that_cannot_be_chosen_are_left_out(
    run: Callable[[str, int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nothing has kernels for low bits."""
    monkeypatch.setattr(low_bit, "product_seconds", lambda *asked: dict.fromkeys(priced(*asked), 1.0))
    assert [*run("all in 8 bits", 5)] == ["all in 8 bits"]
    with pytest.warns(JobWarning, match="bits chosen is left out: no choice of bits"):
        assert [*run("bits chosen", 5)] == ["all in 8 bits"]


def test_rows_on_other_texts_are_not_mixed_in(run: Callable[[str, int], dict[str, Any]]) -> None:
    assert [*run("route by even", 5)] == ["route by even"]
    assert [*run("in closed form, no carry", 4)] == ["bridge in closed form, no carry"]
