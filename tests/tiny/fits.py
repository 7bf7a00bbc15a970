"""Arguments of a fit that takes a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.tiny.folders import TinyFolder


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
