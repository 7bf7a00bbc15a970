"""Fits of the tiny verifier, both stages of them as ``viasd fit`` runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.tiny import TinyFolder
from viasd_calib.prompts import SplitShares
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.distillation import DistillationModule
from viasd_calib.training.fit import fit_slim_verifier
from viasd_calib.training.gate_learning import GateModule
from viasd_calib.training.options import RouteChoice, SlimVerifierOptions

SHARES = SplitShares(fit=1.0, calibrate=0.0, test=0.0)


def small_options(verifier: TinyFolder, choice: RouteChoice = "gates", **changes: Any) -> SlimVerifierOptions:
    entries: dict[str, Any] = {"target_cost": 0.7, "route_steps": 3, "adapter_rank": 2, "max_run": 4, **changes}
    return SlimVerifierOptions(str(verifier), route_choice=choice, **entries)


def traced(traces: Path, tokens: int = 128, **changes: Any) -> TraceDataModule:
    return TraceDataModule([str(traces)], shares=SHARES, max_batch_tokens=tokens, **changes)


class Trainers:
    """Makes trainers without any output, which checkpoint after each step, and keeps them."""

    def __init__(self, folder: Path | None, callbacks: Sequence[Callback] = (), **settings: Any) -> None:
        self.folder = folder
        self.callbacks = callbacks
        self.settings: dict[str, Any] = {"limit_val_batches": 1, "max_epochs": 100, **settings}
        self.made: list[Trainer] = []

    def __call__(self, **changes: Any) -> Trainer:
        own = [ModelCheckpoint(self.folder, save_last=True, every_n_train_steps=1, save_top_k=0)] if self.folder else []
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, enable_checkpointing=self.folder is not None, gradient_clip_val=1.0,
            callbacks=[*self.callbacks, *own], **{**self.settings, **changes},
        )  # fmt: skip
        self.made.append(trainer)
        return trainer


def fit(
    options: SlimVerifierOptions, traces: Path, folder: Path, steps: int, resume: str | None = None, **settings: Any
) -> DistillationModule:
    """Both stages, ``steps`` of them together, on batches of 128 tokens."""
    return fit_slim_verifier(options, traced(traces), Trainers(folder, **settings), max_steps=steps, ckpt_path=resume)


def learn_gates(
    options: SlimVerifierOptions, traces: Path, steps: int, folder: Path | None = None, **settings: Any
) -> GateModule:
    """The first stage alone."""
    module = GateModule(options)
    torch.manual_seed(0)
    Trainers(folder, **settings)(max_steps=steps).fit(module, datamodule=traced(traces))
    return module
