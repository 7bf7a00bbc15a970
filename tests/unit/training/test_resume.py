"""A run that was killed and resumed from its last checkpoint learns from the same batches, with the same losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.rounding import rounding
from tests.tiny import LAYERS, TinyFolder, even_costs
from viasd_calib.errors import TraceError
from viasd_calib.prompts import SplitShares
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.texts import TraceBatch
from viasd_calib.training import student
from viasd_calib.training.distillation import DistillationModule
from viasd_calib.training.drafter import DrafterModule
from viasd_calib.training.fit import fit_slim_verifier
from viasd_calib.training.options import SlimVerifierOptions

MAX_TOKENS = 100
LOSSES = ("adapter_kl", "route_kl", "train_loss")
"""What the modules log."""
GATE_STEPS = 6
MakeModule = Callable[[str], LightningModule | SlimVerifierOptions]
"""A module to train, or the options of a fit, whose stages are trained one after the other."""


class Step(NamedTuple):
    """What one optimiser step learned from, and its loss."""

    indices: tuple[int, ...]
    loss: float


class Killed(Exception):
    """Stands for the end of the process."""


class Recorder(Callback):
    """Notes every step of all stages, and kills the run before step ``kill_at``."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.steps: dict[int, Step] = {}
        self.epochs: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.step(trainer) == self.kill_at:
            raise Killed

    def on_train_batch_end(self, trainer: Trainer, _module: Any, _outputs: Any, batch: TraceBatch, *_: Any) -> None:
        known = trainer.callback_metrics
        loss = next(float(known[name]) for name in LOSSES if name in known)
        self.steps[self.step(trainer)] = Step(tuple(batch.indices), loss)
        self.epochs[self.step(trainer)] = trainer.current_epoch

    @staticmethod
    def step(trainer: Trainer) -> int:
        """Steps done, those of gates included that came before."""
        options = getattr(trainer.lightning_module, "options", None)
        second = isinstance(trainer.lightning_module, DistillationModule) and options.route_choice == "gates"
        return trainer.global_step + GATE_STEPS * second


def gates(verifier: str) -> SlimVerifierOptions:
    return SlimVerifierOptions(
        verifier, target_cost=0.7, route_choice="gates", route_steps=GATE_STEPS, adapter_rank=2, max_run=4
    )


def span(verifier: str) -> SlimVerifierOptions:
    return SlimVerifierOptions(verifier, target_cost=0.7, adapter_rank=2, max_run=4)


def make_drafter(verifier: str) -> LightningModule:
    return DrafterModule(verifier, num_layers=1, head_vocab=16, taps=(1, LAYERS), depths=(1, 2), closed_form_texts=4)


@pytest.fixture(autouse=True)
def _costs_that_do_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "sublayer_costs", even_costs)


def data_of(traces: Path, **changes: Any) -> TraceDataModule:
    entries: dict[str, Any] = {"max_batch_tokens": MAX_TOKENS, "seed": 3}
    return TraceDataModule(
        [str(traces)], shares=SplitShares(fit=1.0, calibrate=0.0, test=0.0), **{**entries, **changes}
    )


def train(
    made: LightningModule | SlimVerifierOptions,
    data: TraceDataModule,
    folder: Path,
    *,
    kill_at: int | None = None,
    resume: bool = False,
    save_every: int = 1,
    **settings: Any,
) -> Recorder:
    """Train, and note the steps; with ``resume`` from the last checkpoint in ``folder``."""
    torch.manual_seed(0)
    recorder = Recorder(kill_at)
    save = partial(ModelCheckpoint, folder, save_last=True, every_n_train_steps=save_every, save_top_k=0)

    def trainer(**changes: Any) -> Trainer:
        return Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1,
            callbacks=[recorder, save()],
            **{**settings, **changes},
        )

    last = str(folder / "last.ckpt") if resume else None
    if isinstance(made, SlimVerifierOptions):
        fit_slim_verifier(made, data, trainer, max_steps=settings.get("max_steps", -1), ckpt_path=last)
    else:
        trainer().fit(made, datamodule=data, ckpt_path=last)
    return recorder


def assert_same(steps: dict[int, Step], wanted: dict[int, Step]) -> None:
    assert steps.keys() == wanted.keys()
    for number, step in steps.items():
        assert step.indices == wanted[number].indices, f"step {number} learned from another batch"
        loss = wanted[number].loss
        assert step.loss == pytest.approx(loss, abs=rounding(torch.tensor(loss))), f"step {number}"


def epoch_length(traces: Path) -> int:
    data = data_of(traces)
    data.setup()
    return len(data.train_dataloader())


@pytest.mark.parametrize("by", ["epochs", "steps"])
@pytest.mark.parametrize("make", [gates, span, make_drafter], ids=["gates", "span", "drafter"])
def test_wherever_it_is_killed_the_resumed_run_has_the_same_losses(
    make: MakeModule, by: str, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    length = epoch_length(traces)
    assert length >= 4
    settings: dict[str, Any] = {"max_epochs": 3, "val_check_interval": 0.5}
    if by == "steps":  # as the recipe of a fit has it
        settings = {"max_epochs": 100, "max_steps": 3 * length - 1, "val_check_interval": length + 1,
                    "check_val_every_n_epoch": None}  # fmt: skip
    whole = train(make(str(tiny_folder)), data_of(traces), tmp_path / "whole", **settings)
    if by == "steps":
        assert len(whole.steps) == 3 * length - 1
    else:  # those of the distillation; gates take as many as their steps need
        assert len(whole.steps) == 3 * length + GATE_STEPS * (make is gates)
    for kill_at in (2, length, length + 2):
        folder = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            train(make(str(tiny_folder)), data_of(traces), folder, kill_at=kill_at, **settings)
        rest = train(make(str(tiny_folder)), data_of(traces), folder, resume=True, **settings)
        assert_same(rest.steps, {number: step for number, step in whole.steps.items() if number > kill_at})
        assert rest.epochs.items() <= whole.epochs.items()


@pytest.mark.parametrize("make", [gates, span, make_drafter], ids=["gates", "span", "drafter"])
def test_steps_after_the_last_checkpoint_are_done_again(
    make: MakeModule, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    whole = train(make(str(tiny_folder)), data_of(traces), tmp_path / "whole", max_epochs=2)
    kill_at = epoch_length(traces) + 2
    saved = 3 * ((kill_at) // 3)
    with pytest.raises(Killed):
        train(make(str(tiny_folder)), data_of(traces), tmp_path / "cut", kill_at=kill_at, save_every=3, max_epochs=2)
    rest = train(make(str(tiny_folder)), data_of(traces), tmp_path / "cut", resume=True, save_every=3, max_epochs=2)
    assert_same(rest.steps, {number: step for number, step in whole.steps.items() if number > saved})


def test_a_run_that_is_killed_twice(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    """Also where the second run ends before it has trained at all."""
    whole = train(make_drafter(str(tiny_folder)), data_of(traces), tmp_path / "whole", max_epochs=2)
    for kill_at, resume in ((2, False), (2, True), (3, True)):
        with pytest.raises(Killed):
            train(
                make_drafter(str(tiny_folder)), data_of(traces), tmp_path, kill_at=kill_at, resume=resume, max_epochs=2
            )
    rest = train(make_drafter(str(tiny_folder)), data_of(traces), tmp_path, resume=True, max_epochs=2)
    assert_same(rest.steps, {number: step for number, step in whole.steps.items() if number > 3})


def test_a_resumed_run_does_not_warn_of_its_loader(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(Killed):
        train(gates(str(tiny_folder)), data_of(traces), tmp_path, kill_at=2, max_epochs=1)
    train(gates(str(tiny_folder)), data_of(traces), tmp_path, resume=True, max_epochs=1)
    assert not [str(warning.message) for warning in recwarn if "resum" in str(warning.message)]


def test_the_same_seed_gives_the_same_run_and_another_one_another_order(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    first, again, other = (
        train(make_drafter(str(tiny_folder)), data_of(traces, seed=seed), tmp_path / name, max_epochs=2)
        for seed, name in ((3, "first"), (3, "again"), (4, "other"))
    )
    assert_same(again.steps, first.steps)
    order = [[step.indices for step in run.steps.values()] for run in (first, other)]
    assert order[0] != order[1]
    half = len(order[0]) // 2
    assert sorted(order[0][:half]) == sorted(order[0][half:])
    assert order[0][:half] != order[0][half:], "the second epoch must have an order of its own"


@pytest.mark.parametrize("changes", [{"seed": 4}, {"max_batch_tokens": 60}, {"validation_share": 0.5}])
def test_other_batches_are_refused(
    changes: dict[str, Any], tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(make_drafter(str(tiny_folder)), data_of(traces), tmp_path, kill_at=2, max_epochs=1)
    with pytest.raises(TraceError, match="another order of batches; resume with"):
        train(make_drafter(str(tiny_folder)), data_of(traces, **changes), tmp_path, resume=True, max_epochs=1)
