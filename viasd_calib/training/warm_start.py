"""What one training hands to the next: the module's state and the optimizer's, without how far the first had come."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import Trainer

from viasd_calib.files import atomic_path

STATE_FILE = "state.ckpt"
WARM_START_KEYS = ("pytorch-lightning_version", "state_dict", "optimizer_states", "lr_schedulers", "gathered")
"""Entries of a Lightning checkpoint that do not hang on the texts or the length of the training it was made in."""


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
        torch.save({name: whole[name] for name in WARM_START_KEYS if name in whole}, temporary)
