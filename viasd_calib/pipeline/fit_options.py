"""The options of a fit: what is learned from, how, and where the results lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from viasd_calib.choices import OffloadKind
from viasd_calib.errors import CalibrationError
from viasd_calib.option_types import Count, check_options
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.options import SlimVerifierOptions

TRAINER_DEFAULTS: Mapping[str, Any] = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""Arguments of the trainer that differ from Lightning's defaults."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Train a slim verifier on traces, and fit the first gates.

    Args:
        data: traces to learn from.
        out: folder for route, adapter and gates.
        model: how the slim verifier is found and trained.
        trainer: arguments of Lightning's ``Trainer``, which train in one epoch with clipped gradients by default.
        gate_folders: traces that gates are fitted on and compared with, in place of those the route learned from.
        rounds: how often to train; between two rounds the three-tier decoder answers the prompts of the traces.
        seed: of everything that is drawn; None leaves random generators as they are.
        memory: bytes that weights may take where it will decode with layers read for each pass, as 300MB: it chooses
            the bits of a slim verifier of all layers. None for no bound.
        offload: "disk" to fit gates alone with the verifier's layers read for each of its passes, which takes little
            memory; None for all of it in memory.
        ckpt_path: checkpoint to go on from, or "last" for the newest one; None begins anew.

    Raises:
        CalibrationError: an option is of another type or out of its range, or there is no such argument of ``Trainer``.

    Example:
        >>> options = FitOptions(data=TraceDataModule(["runs/traces"]), trainer={"max_steps": 20})
        >>> options.entries()["trainer.max_steps"], options.entries()["data.folders"]
        (20, ['runs/traces'])
    """

    data: TraceDataModule
    out: str = "runs/fit"
    model: SlimVerifierOptions = field(default_factory=SlimVerifierOptions)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    gate_folders: Sequence[str] = ()
    rounds: Count = 1
    seed: int | None = 0
    ckpt_path: str | None = None
    memory: int | str | None = None
    offload: OffloadKind | None = None

    def __post_init__(self) -> None:
        check_options(self, CalibrationError)
        known = signature(Trainer).parameters
        for name in self.trainer:
            if name not in known:
                raise CalibrationError(f"trainer has {name!r}, which Lightning's Trainer does not take; leave it out")

    def entries(self) -> dict[str, Any]:
        """The options by their names on the command line."""
        own = {"out": self.out, "gate_folders": [*self.gate_folders], "rounds": self.rounds}
        own |= {"seed_everything": self.seed, "ckpt_path": self.ckpt_path, "memory": self.memory}
        own |= {"offload": self.offload}
        own |= {"data.folders": [str(folder) for folder in self.data.folders]}
        own |= {f"model.{name}": value for name, value in asdict(self.model).items()}
        return own | {f"trainer.{name}": value for name, value in self.trainer.items()}

    def new_trainer(self, **changes: Any) -> Trainer:
        """A trainer of these options, with callbacks of its own."""
        arguments = {**TRAINER_DEFAULTS, **self.trainer, **changes}
        return Trainer(**{**arguments, "callbacks": deepcopy(arguments.get("callbacks"))})


@contextmanager
def lightning_refusals() -> Iterator[None]:
    """Within it, options that Lightning refuses are a :class:`~viasd_calib.errors.CalibrationError`."""
    try:
        yield
    except MisconfigurationException as error:
        raise CalibrationError(f"Lightning refuses these options: {' '.join(str(error).split())}") from error
