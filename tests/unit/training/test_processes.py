"""Several processes that train together, against one that gathers as many batches before each step.

Of n processes, each with ``accumulate`` = a, a step learns from the same n x a batches of the one order as a step of
one process with ``accumulate`` = n x a; an epoch's batches are a multiple of n here, so none is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.rounding import assert_trained_alike
from tests.tiny import TinyFolder, tiny_traces
from viasd_calib.training.options import RouteChoice

ROOT = Path(__file__).parents[3]
TEXTS = 24
STEPS = 8
GATE_STEPS = 3
TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
AFTER_EACH_STEP = {"every_n_train_steps": 1, "save_top_k": 0, "save_last": True}
AFTER_EACH_VALIDATION = {"every_n_epochs": 1, "save_top_k": -1, "filename": "{step}"}
CHECKPOINTS = json.dumps(
    [
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "checkpoints", **when}}
        for when in (AFTER_EACH_STEP, AFTER_EACH_VALIDATION)
    ]
)


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), TEXTS, max_new_tokens=8, batch_size=8)


def state_in(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


class Fitted(NamedTuple):
    """What a run of ``viasd fit`` wrote."""

    folder: Path
    said: str

    @property
    def state(self) -> dict[str, Tensor]:
        """The module's state after the last step."""
        return state_in(self.folder / "checkpoints/last.ckpt")

    @property
    def steps(self) -> int:
        """Steps of the last stage."""
        steps: int = torch.load(self.folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        return steps

    @property
    def began(self) -> dict[str, Tensor]:
        """The state at the first validation of the distillation, a step after its start at most."""
        saved = sorted(self.folder.glob("checkpoints/step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        return next(state for state in map(state_in, saved) if "kept" in state)

    @property
    def written(self) -> dict[str, Tensor]:
        """The tensors that the slim verifier is decoded with."""
        return {
            **load_file(self.folder / "fit" / "adapter.safetensors"),
            **load_file(self.folder / "fit" / "bridges.safetensors"),
        }


def run_fit(
    folder: Path, verifier: TinyFolder, traces: Path, choice: RouteChoice, accumulate: int, *options: str
) -> Fitted:
    """Run ``viasd fit`` as a process of its own: one text a batch, so that an epoch is ``TEXTS`` batches."""
    folder.mkdir()
    command = [
        sys.executable, str(ROOT / "tests/even_fit.py"), "--out", "fit", "--model.verifier", str(verifier),
        "--model.route_choice", choice, "--model.route_steps", str(GATE_STEPS), "--model.target_cost", "0.7",
        "--model.adapter_rank", "2", "--model.max_run", "4", "--model.accumulate", str(accumulate),
        "--data.folders", f"[{traces}]", "--data.shares", '{"fit": 1.0, "calibrate": 0.0, "test": 0.0}',
        "--data.validation_share", "0.0", "--data.max_batch_tokens", "1", "--trainer.accelerator", "cpu",
        "--trainer.max_steps", str(STEPS), "--trainer.max_epochs", "9", "--trainer.val_check_interval", "3",
        "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.callbacks", CHECKPOINTS,
        *options,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Fitted(folder, done.stdout)


@pytest.fixture(scope="module")
def gates_by_two(tiny_folder: TinyFolder, traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A route of gates, trained by two processes. A process takes ten seconds to load all that it trains with."""
    return run_fit(tmp_path_factory.mktemp("fits") / "two", tiny_folder, traces, "gates", 2, *TWO)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["gates", "span"])
def test_two_processes_learn_what_one_does(
    choice: RouteChoice, gates_by_two: Fitted, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    one = run_fit(tmp_path / "one", tiny_folder, traces, choice, 4, "--trainer.devices", "1")
    two = gates_by_two if choice == "gates" else run_fit(tmp_path / "two", tiny_folder, traces, choice, 2, *TWO)
    assert one.steps == two.steps == (STEPS - GATE_STEPS if choice == "gates" else STEPS)
    assert_trained_alike(two.state, one.state, one.began)
    assert_trained_alike(two.written, one.written, {})
    assert two.said.count("what was learned") == 1, "one process alone writes"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["gates", "distillation"])
def test_two_processes_go_on_from_either_stage(
    stage: str, gates_by_two: Fitted, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    """From a checkpoint between two steps of two batches, the next step learns from the second batch alone."""
    saved = sorted(gates_by_two.folder.glob("checkpoints/step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    checkpoint = next(path for path in saved if ("kept" in state_in(path)) == (stage == "distillation"))
    rest = run_fit(tmp_path / "rest", tiny_folder, traces, "gates", 2, *TWO, "--ckpt_path", str(checkpoint))
    assert rest.steps == STEPS - GATE_STEPS
    assert torch.equal(rest.state["kept"], gates_by_two.state["kept"])
    assert rest.state.keys() == gates_by_two.state.keys()
