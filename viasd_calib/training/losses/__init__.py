"""Training losses: what each place of a text costs a slim verifier q' by how it differs from q; one file each.

A loss is a function that :func:`training_loss` registers under the name that ``viasd fit --model.objective`` takes.
Every module of this package is imported here, so a new file is all that a new loss takes.
"""

from __future__ import annotations

import importlib
import pkgutil

from viasd_calib.training.losses.registry import LOSSES, TrainingLoss, training_loss

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LOSSES", "TrainingLoss", "training_loss"]
