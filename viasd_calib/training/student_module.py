"""What learning gates and distilling have in common: a frozen verifier, its student, and a loss on traced texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torchmetrics import MeanMetric

from viasd_calib.errors import CalibrationError
from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.models import LoadVerifier, load_verifier
from viasd_calib.replay.teacher import refuse_foreign_traces
from viasd_calib.slim.plan import Sublayer
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.texts import TraceBatch
from viasd_calib.training.losses import LOSSES
from viasd_calib.training.options import SlimVerifierOptions
from viasd_calib.training.student import Student


class StudentModule(LightningModule):
    """Trains something of q' on traces. The verifier is no submodule, so no checkpoint holds it.

    Args:
        options: of the fit.
        load: where the verifier comes from.
    """

    STAGE: str
    """What is trained, in the names of what is logged."""

    def __init__(self, options: SlimVerifierOptions, load: LoadVerifier = load_verifier) -> None:
        super().__init__()
        self.save_hyperparameters(asdict(options))
        self.options = options
        self.agreement = MeanMetric()
        self._load = load
        self._student: Student | None = None

    @property
    def student(self) -> Student:
        """q' of the frozen verifier."""
        if self._student is None:
            raise RuntimeError("the verifier is loaded by configure_model, which the trainer calls")
        return self._student

    @property
    def texts(self) -> Sequence[Any]:
        """Texts that bridges are fitted and neurons ranked on."""
        data: TraceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.drawn_texts(self.options.bridge_texts)

    def configure_model(self) -> None:
        """Load the verifier and make what is trained; called by Lightning before a checkpoint is read.

        Raises:
            CalibrationError: ``head_vocab`` is not a size that the verifier's output can have, or the trainer is set up
                for what cannot be done (:func:`check_trainer`).
            TraceError: the traces are of another verifier.
        """
        if self._student is not None:
            return
        check_trainer(self.trainer)
        verifier = self._load(self.options.verifier, device=str(self.trainer.strategy.root_device))
        give_freed_memory_back()  # loading widens weights
        refuse_foreign_traces(self.trainer, verifier.ref)
        self._student = Student(verifier, self.options)
        self.begin(resumes=self.trainer.ckpt_path is not None)

    @abstractmethod
    def begin(self, resumes: bool) -> None:
        """Make what is trained.

        Args:
            resumes: whether a checkpoint will bring what takes long to find.
        """

    def narrow(self, neuron_orders: Tensor | None) -> None:
        """Give q' its narrow MLPs, with neurons in this order; None ranks them. Nothing where none are narrow."""
        if not self.student.narrowed:
            return
        if neuron_orders is None:  # rounding must not part the processes
            neuron_orders = self.trainer.strategy.broadcast(self.student.rank_neurons(self.texts))
        self.student.narrow(neuron_orders)
        self.register_buffer("neuron_orders", neuron_orders.to(self.device))

    @abstractmethod
    def sublayers(self) -> Sequence[Sublayer]:
        """What q' runs under its discrete route."""

    def draw_seed(self, batch_idx: int) -> int:
        """Seed of what is drawn for a training batch: the same after a resume, another for each process."""
        place = batch_idx * self.trainer.world_size + self.trainer.global_rank
        return (self.current_epoch << 32) + place

    def loss(self, batch: TraceBatch, logits: Tensor) -> Tensor:
        """Mean of the objective over the places of a batch: []; logged under stage and objective."""
        value = LOSSES[self.options.objective](batch.q_ids, batch.q_log_probs, logits).mean()
        name = f"{self.STAGE}_{self.options.objective}"
        self.log(name, value, prog_bar=True, batch_size=len(batch.q_ids), sync_dist=True)
        return value

    def validation_step(self, batch: TraceBatch, _batch_idx: int) -> None:
        """Share of generated places at which q' under its discrete route chooses q's token."""
        logits = self.student.logits(batch, self.sublayers(), seed=0)
        self.agreement.update((logits.argmax(-1) == batch.q_ids[:, 0]).float())
        self.log("agreement", self.agreement, prog_bar=True, on_epoch=True, batch_size=len(batch.q_ids))

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint of another module.

        Raises:
            CalibrationError: naming what is missing or unknown.
        """
        own = self.state_dict().keys()
        if own != state.keys():
            missing, unknown = sorted(own - state.keys())[:3], sorted(state.keys() - own)[:3]
            raise CalibrationError(
                f"the checkpoint does not fit these options: missing {missing}, unknown {unknown}; resume with those "
                "that it was made with"
            )


def check_trainer(trainer: Trainer) -> None:
    """Refuse what a slim verifier cannot be trained with.

    Raises:
        CalibrationError: several processes with another strategy than ``ddp``, or a search for one learning rate.
    """
    strategy = trainer.strategy
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise CalibrationError(
            f"{type(strategy).__name__} cannot train the slim verifier: it would shard what is trained, which is "
            "small, and not the frozen verifier; set trainer.strategy to ddp"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
        raise CalibrationError(
            "LearningRateFinder sets one rate for all, and gates, bridges and adapter have each their own; leave it "
            "out, and try a few of --model.adapter_learning_rate and --model.bridge_learning_rate"
        )
