"""Training a drafter: where it begins, and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file

from tests.tiny import LAYERS, TinyFolder
from viasd_calib.draft.build import SHALLOW_TENSORS
from viasd_calib.errors import ModelError
from viasd_calib.prompts import SplitShares
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.drafter import DrafterModule


def train(verifier: TinyFolder, traces: Path, out: Path | None, **changes: Any) -> None:
    """Train a drafter for one epoch over the tiny verifier's traces."""
    settings: dict[str, Any] = {"num_layers": 1, "head_vocab": 16, "taps": (1, LAYERS), "depths": (1,), **changes}
    module = DrafterModule(str(verifier), closed_form_texts=4, out=None if out is None else str(out), **settings)
    data = TraceDataModule(
        [str(traces)], shares=SplitShares(fit=1, calibrate=0, test=0), validation_share=0.2, max_batch_tokens=100
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


@pytest.fixture(scope="module")
def earlier(tiny_folder: TinyFolder, traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained drafter."""
    out = tmp_path_factory.mktemp("earlier")
    train(tiny_folder, traces, out)
    return out


def test_a_start_is_what_training_goes_on_from(
    tiny_folder: TinyFolder, traces: Path, earlier: Path, tmp_path: Path
) -> None:
    """With a learning rate of nothing the drafter stays the one it began as, head vocabulary included."""
    train(tiny_folder, traces, tmp_path, start=str(earlier), learning_rate=0.0, weight_decay=0.0)
    before, after = (load_file(folder / SHALLOW_TENSORS) for folder in (earlier, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_start_is_trained_on(tiny_folder: TinyFolder, traces: Path, earlier: Path, tmp_path: Path) -> None:
    """Every matrix of the earlier drafter moves: none stayed frozen as it was loaded."""
    train(tiny_folder, traces, tmp_path, start=str(earlier), learning_rate=0.1, depths=(2,))
    before, after = (load_file(folder / SHALLOW_TENSORS) for folder in (earlier, tmp_path))
    still = [name for name in before if before[name].dim() == 2 and torch.equal(before[name], after[name])]
    assert still == []


def test_a_start_of_another_shape_is_refused(tiny_folder: TinyFolder, traces: Path, earlier: Path) -> None:
    with pytest.raises(ModelError, match=r"head_vocab=16.*set num_layers, head_vocab and taps so"):
        train(tiny_folder, traces, None, start=str(earlier), head_vocab=12)


def test_a_start_that_is_no_drafter_is_refused(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no shallow drafter \(draft.json\)"):
        train(tiny_folder, traces, None, start=str(tmp_path))
