"""Options of ``viasd fit`` that a slim verifier cannot be trained with, refused before anything long begins."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from viasd_calib.cli.configurations import given_options
from viasd_calib.errors import CalibrationError, UsageError, ViasdError
from viasd_calib.pipeline.fit_checks import check_devices, check_fit, last_checkpoint

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"trainer.precision": "16-true"}, "--trainer.precision 16-true is not supported"),
    ({"trainer.precision": "64-true"}, "give 32-true, bf16-mixed or, on a GPU, 16-mixed"),
    ({"trainer.precision": 64}, "--trainer.precision 64 is not supported"),
    ({"trainer.limit_train_batches": 0}, "--trainer.limit-train-batches is 0, so nothing would be learned"),
    ({"trainer.limit_train_batches": 0.0}, "leave it out to train on all"),
    ({"trainer.max_steps": 0}, "or -1 for no limit"),
    ({"trainer.max_epochs": 0}, "--trainer.max-epochs is 0"),
    ({"trainer.accumulate_grad_batches": 2, "model.accumulate": 3}, "both are the batches of a step, so give one"),
    ({"seed_everything": -3}, "--seed-everything is -3; give a whole number of at least 0 and below 2**32"),
    ({"seed_everything": 2**32}, "below 2**32"),
    ({"ckpt_path": "none.ckpt"}, "there is no checkpoint none.ckpt"),
    ({"trainer.callbacks.monitor": "nonsense"}, "monitor one of agreement, adapter_kl, epoch, step"),
    ({"trainer.callbacks": [{"class_path": "X", "init_args": {"monitor": "route_kl"}}]}, "monitors 'route_kl'"),
    ({"out": ""}, "--out is empty"),
    ({"data.folders": []}, "--data.folders is empty; give the folder that viasd capture wrote"),
    ({"data.folders": ["none"]}, "none/capture.json"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ViasdError) as refused:
        check_fit(options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainer.precision": "bf16-mixed", "trainer.max_steps": -1, "trainer.limit_train_batches": 1.0},
        {"trainer.accumulate_grad_batches": 2, "trainer.gradient_clip_val": 0.5, "seed_everything": True},
        {"trainer.callbacks": [{"init_args": {"monitor": "agreement"}}]},
        {"trainer.callbacks.monitor": "route_tv", "model.route_choice": "gates", "model.objective": "tv"},
    ],
)
def test_options_that_can_be_are_let_through(options: dict[str, Any]) -> None:
    check_fit(options)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CalibrationError, match="is no checkpoint, or was cut short"):
        check_fit({"ckpt_path": str(path)})
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("data.pkl", b"")
    check_fit({"ckpt_path": str(path)})


def test_last_is_the_checkpoint_that_was_written_last(tmp_path: Path) -> None:
    options = {"trainer.default_root_dir": str(tmp_path), "ckpt_path": "last"}
    with pytest.raises(CalibrationError, match="leave it out to begin anew"):
        check_fit(options)
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    for age, name in enumerate(("new.ckpt", "old.ckpt")):
        (folder / name).touch()
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert last_checkpoint(options) == folder / "new.ckpt"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "newest.ckpt").touch()
    options["trainer.callbacks"] = [{"init_args": {"dirpath": str(elsewhere)}}]  # type: ignore[assignment]
    assert last_checkpoint(options) == elsewhere / "newest.ckpt"


def test_words_and_configurations_are_read_in_their_order(tmp_path: Path) -> None:
    config = tmp_path / "fit.yaml"
    config.write_text("trainer: {max_steps: 5, precision: 32-true}\ndata: {folders: [a]}\n")
    words = ["--trainer.max_steps", "3", "--config", str(config), "--fast", "--trainer.precision=16-true"]
    assert given_options(words) == {
        "trainer.max_steps": 5, "trainer.precision": "16-true", "data.folders": ["a"], "fast": True
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"cannot read the configuration .*none\.yaml"):
        given_options(["-c", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(("accelerator", "gpu"), [("cuda", "cuda"), ("mps", "mps"), ("gpu", "cuda")])
def test_devices_that_are_not_there_are_refused(accelerator: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for there in ("auto", "cpu"):
        check_devices(there, "bf16-mixed")
        with pytest.raises(CalibrationError, match="needs a GPU; on a CPU give bf16-mixed"):
            check_devices(there, "16-mixed")
    with pytest.raises(CalibrationError, match=f"--trainer.accelerator {accelerator}: PyTorch finds no such device"):
        check_devices(accelerator, None)
    monkeypatch.setattr(torch.cuda if gpu == "cuda" else torch.backends.mps, "is_available", lambda: True)
    check_devices(accelerator, "16-mixed")
    with pytest.raises(CalibrationError, match="needs a GPU"):
        check_devices("cpu", "16-mixed")
