"""What Lightning prints while training: no advertisement, no false alarm, but every real warning."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from tests.tiny import TinyFolder, tiny_traces
from viasd_calib.training.lightning_output import BESIDE_THE_POINT, CHATTER, quiet_lightning

ROOT = Path(__file__).parents[3]
UNWANTED = ("Tip:", "LeafSpec", "eval mode at the start", "workers", "pre-optimization", "args parameter")
FIT = "import sys; from viasd_calib.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 16, max_new_tokens=8, batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("begin", [("-c", FIT, "fit", "--out", "fit", "--model.target_cost", "0.95",
                                    "--model.adapter_rank", "2"),
                                   (str(ROOT / "train/drafter.py"), "fit", "--model.taps", "[1,4]",
                                    "--model.num_layers", "1", "--model.head_vocab", "12")],
                         ids=["viasd fit", "train/drafter.py"])  # fmt: skip
def test_training_says_what_matters_alone(
    begin: tuple[str, ...], tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    checkpoint = '[{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}]'
    command = [
        sys.executable, *begin, "--model.verifier", str(tiny_folder), "--data.folders", f"[{traces}]",
        "--data.shares", '{"fit": 1.0, "calibrate": 0.0, "test": 0.0}', "--data.validation_share", "0.5",
        "--trainer.max_steps", "3",
        "--trainer.max_epochs", "9", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks", checkpoint,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not [word for word in UNWANTED if word in said], said
    assert not [line for line in said.splitlines() if any(words in line for words in CHATTER)], said
    assert "smaller than the logging interval" in said, "a warning with a point, which must show"


def test_a_real_warning_still_shows() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_lightning()
        for message in (*BESIDE_THE_POINT, "The verifier is on fire", "Found 3 module(s) in eval mode"):
            # As from within Lightning: the filters look at the module that a warning is attributed to.
            warnings.warn_explicit(message, UserWarning, "loop.py", 1, module="lightning.pytorch.loops")
        warnings.warn_explicit(BESIDE_THE_POINT[0], FutureWarning, "ours.py", 1, module="viasd_calib.slim")
        rank_zero_warn("The loss is not finite")
    said = [str(warning.message) for warning in shown]
    assert said == ["The verifier is on fire", "Found 3 module(s) in eval mode", BESIDE_THE_POINT[0],
                    "The loss is not finite"]  # fmt: skip


def test_only_chatter_leaves_the_log() -> None:
    quiet_lightning()
    quiet_lightning()  # as in `viasd run`, after another command of the same process
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    assert len(logger.filters) == len(set(logger.filters))
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    logger.addHandler(handler)
    try:
        rank_zero_info("💡 Tip: For seamless cloud uploads and versioning, try another package")
        rank_zero_info("GPU available: False, used: False")
        rank_zero_info("`Trainer.fit` stopped: `max_steps=3` reached.")
        rank_zero_info("`Trainer.fit` stopped: No training batches.")
        logger.warning("GPU available: True, but not used")
    finally:
        logger.removeHandler(handler)
    assert shown.getvalue() == "`Trainer.fit` stopped: No training batches.\nGPU available: True, but not used\n"
