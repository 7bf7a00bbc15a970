"""Training a slim verifier: gates, where they are to find the route, and then distillation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from viasd_calib.errors import CalibrationError
from viasd_calib.models import LoadVerifier, load_verifier
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.distillation import DistillationModule
from viasd_calib.training.gate_learning import GateModule
from viasd_calib.training.options import SlimVerifierOptions

GATES = "gates.log_alpha"
EARLIER_STEPS = "earlier_steps"
"""Tensors that a checkpoint of gates has, and one of a distillation."""

NewTrainer = Callable[..., Trainer]
"""Makes a trainer whose arguments are as the user set them but for those it is called with."""


def fit_slim_verifier(
    options: SlimVerifierOptions,
    data: TraceDataModule,
    new_trainer: NewTrainer,
    *,
    max_steps: int = -1,
    ckpt_path: str | Path | None = None,
    load: LoadVerifier = load_verifier,
    folder: Path | None = None,
) -> DistillationModule:
    """Find the route and train the slim verifier; each stage is a LightningModule with a trainer of its own.

    Gates take the first ``route_steps`` of all steps, however many epochs these are. Both stages write checkpoints
    where the trainer's callbacks say, and a checkpoint of either is resumed from. Where the route leaves nothing
    to train (no adapter, no bridge, no parameters of further parts), q' is only validated.

    Args:
        options: of the fit.
        data: traces.
        new_trainer: makes the trainer of a stage; ``functools.partial(Trainer, accelerator="cpu")`` is one.
        max_steps: of both stages together; -1 for no limit.
        ckpt_path: checkpoint to go on from; None begins anew.
        load: where the verifier comes from.
        folder: of the fit, where parts of the route leave what they have measured; None for nowhere.

    Raises:
        CalibrationError: the gates' steps are more than all, or the checkpoint does not fit.
    """
    gate_steps = options.route_steps if options.route_choice == "gates" else 0
    if 0 <= max_steps < gate_steps:
        raise CalibrationError(
            f"max_steps is {max_steps}, and the gates alone take route_steps, {gate_steps}; raise --trainer.max-steps "
            "or lower --model.route-steps"
        )
    shared: dict[str, Any] = {"accumulate_grad_batches": options.accumulate} if options.accumulate > 1 else {}
    state = {} if ckpt_path is None else _state_in(ckpt_path)
    gates: GateModule | None = None
    if GATES in state or (gate_steps and not state):
        gates = GateModule(options, load)
        trainer = new_trainer(max_steps=gate_steps, max_epochs=-1, **shared)
        _train(gates, trainer, data, ckpt_path)
        ckpt_path = None
    if max_steps >= 0 and not int(state.get(EARLIER_STEPS, 0)):  # a later round learns no gates
        max_steps -= gate_steps
    last = new_trainer(max_steps=max_steps, **shared)
    if gates is None:
        module = DistillationModule(options, load, folder=folder)
    else:
        student = gates.student
        module = DistillationModule(
            options, lambda *_, **__: student.verifier, gates.route, student.neuron_orders, folder
        )
        _go_on(last, trainer)
    _train(module, last, data, ckpt_path)
    return module


def _train(
    module: GateModule | DistillationModule, trainer: Trainer, data: TraceDataModule, ckpt_path: str | Path | None
) -> None:
    trainer.ckpt_path = ckpt_path  # here, so that the module sees it when it is configured
    if isinstance(module, DistillationModule) and module.options.rank == 0:
        trainer.validate(module, datamodule=data, verbose=False)  # which finds the route, and so what there is to train
        if not module.trained():
            return
        module.agreement.reset()  # its tensors are of inference mode, which training cannot write into
    trainer.fit(module, datamodule=data)


def _go_on(trainer: Trainer, earlier: Trainer) -> None:
    """Let a trainer's checkpoints take the place of an earlier one's, where these would have gone on."""
    for own, other in zip(trainer.checkpoint_callbacks, earlier.checkpoint_callbacks, strict=True):
        if isinstance(own, ModelCheckpoint) and isinstance(other, ModelCheckpoint) and own.dirpath == other.dirpath:
            own.load_state_dict(other.state_dict())


def _state_in(checkpoint: str | Path) -> dict[str, Any]:
    """The module's state in a checkpoint.

    Raises:
        CalibrationError: it is no checkpoint of a slim verifier's training.
    """
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(
        "state_dict", {}
    )
    if GATES not in state and EARLIER_STEPS not in state:
        raise CalibrationError(
            f"{checkpoint} is no checkpoint of viasd fit; give another, or leave it out to begin anew"
        )
    return state
