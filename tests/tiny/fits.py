"""Arguments of a fit that takes a second, in words and in Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import viasd_calib
from tests.tiny.folders import TinyFolder
from viasd_calib.prompts import SplitShares


def tiny_fit(verifier: TinyFolder, traces: Sequence[Path], out: Path, steps: int = 3) -> list[str]:
    """Words of a ``viasd fit`` that takes a second: few steps, a small adapter, every prompt of the traces."""
    return [
        "--out", str(out), "--model.verifier", str(verifier), "--model.target_cost", "0.7", "--model.adapter_rank", "2",
        "--model.max_run", "4", "--data.folders", json.dumps([str(folder) for folder in traces]), "--data.shares",
        '{"fit": 1.0, "calibrate": 0.0, "test": 0.0}', "--data.validation_share", "0.3",
        "--data.max_batch_tokens", "128", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "1",
        "--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar",
        "false", "--trainer.default_root_dir", str(out),
    ]  # fmt: skip


def tiny_fit_options(
    verifier: TinyFolder, traces: Path, out: Path, steps: int, model: dict[str, Any], **changes: Any
) -> viasd_calib.FitOptions:
    """Options of such a fit in Python.

    Args:
        model: options of the slim verifier.
        changes: of the other options.
    """
    everything = SplitShares(fit=1.0, calibrate=0.0, test=0.0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return viasd_calib.FitOptions(
        data=viasd_calib.TraceDataModule([str(traces)], shares=everything, validation_share=0.3, max_batch_tokens=128),
        out=str(out),
        model=viasd_calib.SlimVerifierOptions(verifier=str(verifier), **model),
        trainer={"accelerator": "cpu", "max_steps": steps, **quiet},
        **changes,
    )
