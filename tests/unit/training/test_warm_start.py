"""A distillation that begins with the state of another one's, on texts and steps of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from tests.small_fits import Trainers, small_options, traced
from tests.tiny import TinyFolder, even_costs
from viasd_calib.training import student
from viasd_calib.training.distillation import DistillationModule
from viasd_calib.training.fit import fit_slim_verifier
from viasd_calib.training.options import RouteChoice
from viasd_calib.training.warm_start import save_warm_start


class Rates(Callback):
    """Notes the share of the adapter's peak rate that each step is made with."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_before_optimizer_step(self, _trainer: Trainer, module: Any, optimizer: Any) -> None:
        if isinstance(module, DistillationModule):
            self.shares.append(optimizer.param_groups[-1]["lr"] / module.options.adapter_learning_rate)


@pytest.fixture(autouse=True)
def _costs_that_do_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "sublayer_costs", even_costs)


def train(
    verifier: TinyFolder, traces: Path, steps: int, tokens: int, state: Path | None = None, **entries: Any
) -> tuple[Trainer, list[float]]:
    torch.manual_seed(0)
    rates = Rates()
    trainers = Trainers(None, [rates], limit_val_batches=0, max_epochs=-1)
    choice: RouteChoice = entries.pop("choice", "span")
    fit_slim_verifier(
        small_options(verifier, choice, **entries), traced(traces, tokens), trainers, max_steps=steps, ckpt_path=state
    )
    return trainers.made[-1], rates.shares


@pytest.mark.parametrize("entries", [{}, {"choice": "gates", "route_steps": 2}], ids=["span", "gates"])
def test_the_next_training_begins_where_the_first_ended(
    entries: dict[str, Any], tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    """Also with other batches, which a Lightning checkpoint refuses, and with as few steps as the first."""
    first, _ = train(tiny_folder, traces, 3, 100, **entries)
    save_warm_start(first, tmp_path / "state.ckpt")
    ended = {name: tensor.clone() for name, tensor in first.lightning_module.state_dict().items()}
    second, _ = train(tiny_folder, traces, 3, 60, tmp_path / "state.ckpt", **entries)
    found = second.lightning_module
    assert isinstance(found, DistillationModule)
    assert second.global_step == 3, "gates are learned once, in the first training"
    assert int(found.earlier_steps) == first.global_step
    assert torch.equal(found.kept, ended["kept"])
    moved = [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, ended[name])]
    assert any("lora_" in name for name in moved)


def test_the_rate_falls_over_the_steps_of_both(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    trainer, first = train(tiny_folder, traces, 20, 100)
    save_warm_start(trainer, tmp_path / "state.ckpt")
    _, second = train(tiny_folder, traces, 20, 60, tmp_path / "state.ckpt")
    assert first == pytest.approx([min(1, (step + 1) / 20) * max(0.1, 1 - step / 20) for step in range(20)])
    assert second == pytest.approx([max(0.1, 1 - step / 40) for step in range(20, 40)])
