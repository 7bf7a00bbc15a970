"""Warm start: a distillation begins with the state of another's module and optimizer, on texts and steps of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import Trainer

from viasd_calib.files import atomic_path

STATE_FILE = "state.ckpt"
WARM_START_KEYS = ("pytorch-lightning_version", "state_dict", "optimizer_states", "lr_schedulers")
"""Entries of a Lightning checkpoint that a warm start takes: none of its loops, callbacks or texts."""


def save_warm_start(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint from which another training begins, with its own texts, steps and epochs, atomically.

    Args:
        trainer: of one process, whose training is over.

    Raises:
        StorageError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        trainer.save_checkpoint(temporary)
        whole = torch.load(temporary, map_location="cpu", weights_only=True)
        whole["state_dict"]["earlier_steps"] += whole["global_step"]  # the schedule spans both trainings
        whole["lr_schedulers"] = []
        torch.save({name: whole[name] for name in WARM_START_KEYS}, temporary)
