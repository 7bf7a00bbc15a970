"""Options of a fit that cannot be, and trainers that cannot train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import FSDPStrategy

from viasd_calib.errors import CalibrationError
from viasd_calib.training.distillation import DistillationModule
from viasd_calib.training.options import SlimVerifierOptions
from viasd_calib.training.student_module import check_trainer


@pytest.mark.parametrize(
    "options",
    [
        {"route_choice": "given"},
        {"route_choice": "given", "route_file": "search.json"},
        {"route_choice": "span", "route_file": "search.json", "route_method": "greedy"},
        {"route_choice": "gates", "route_method": "greedy"},
    ],
)
def test_a_given_route_takes_file_and_method(options: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="give both, with route_choice given, or neither"):
        SlimVerifierOptions(**options)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0; give 1"),
        ({"objective": "l2"}, "objective is 'l2'; give one of kl, margin, total_variation"),
        *(({"target_cost": cost}, f"target_cost is {cost}; give a share") for cost in (0.0, -1.0, 1.5)),
        *(({"mlp_keep": share}, f"mlp_keep is {share}; give a share of neurons") for share in (0.0, -0.5, 1.5)),
    ],
)
def test_an_entry_that_cannot_be_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        SlimVerifierOptions(**entry)


def test_processes_under_another_strategy_are_refused() -> None:
    module = DistillationModule(SlimVerifierOptions())
    module._trainer = SimpleNamespace(world_size=2, strategy=FSDPStrategy(), callbacks=[])  # type: ignore[assignment]
    with pytest.raises(
        CalibrationError, match=r"FSDPStrategy cannot train the slim verifier.*set trainer.strategy to ddp"
    ):
        module.configure_model()


def test_a_search_for_one_learning_rate_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"LearningRateFinder sets one rate.*leave it out"):
        check_trainer(Trainer(accelerator="cpu", logger=False, callbacks=[LearningRateFinder()]))
