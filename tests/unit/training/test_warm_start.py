from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from viasd_calib.training.router import RouterModule

from tests.tiny import TinyFolder, even_costs
from viasd_calib.prompts import SplitShares
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training import router as routing
from viasd_calib.training.warm_start import save_warm_start


@pytest.fixture(autouse=True)
def _costs_that_do_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "sublayer_costs", even_costs)


def train(
    verifier: TinyFolder, traces: Path, steps: int, tokens: int, state: Path | None = None, **entries: Any
) -> Any:
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0, enable_checkpointing=False, max_steps=steps, max_epochs=-1,
    )  # fmt: skip
    shares = SplitShares(fit=1.0, calibrate=0.0, test=0.0)
    module = RouterModule(str(verifier), target_cost=0.7, adapter_rank=2, max_run=4, **entries)
    module.resumes = state is not None
    data = TraceDataModule([str(traces)], shares=shares, max_batch_tokens=tokens)
    trainer.fit(module, datamodule=data, ckpt_path=None if state is None else str(state))
    return trainer


@pytest.mark.parametrize("entries", [{}, {"route_choice": "gates", "route_steps": 2}], ids=["span", "gates"])
def test_the_next_training_begins_where_the_first_ended(
    entries: dict[str, Any], tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    """Also with other batches, which a Lightning checkpoint refuses, and with as few steps as the first."""
    first = train(tiny_folder, traces, 3, 100, **entries)
    save_warm_start(first, tmp_path / "state.ckpt")
    ended = {name: tensor.clone() for name, tensor in first.lightning_module.state_dict().items()}
    second = train(tiny_folder, traces, 3, 60, tmp_path / "state.ckpt", **entries)
    found = second.lightning_module
    assert isinstance(found, RouterModule)
    assert second.global_step == 3
    assert int(found.steps_done) == 6
    assert torch.equal(found.kept, ended["kept"])
    assert found._all_steps() == 6
    moved = [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, ended[name])]
    assert any("lora_" in name for name in moved)


def test_the_rate_falls_over_the_steps_of_both(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    schedule = RouterModule._adapter_schedule

    def noted(module: RouterModule) -> float:
        shares.append(schedule(module))
        return shares[-1]

    monkeypatch.setattr(RouterModule, "_adapter_schedule", noted)
    save_warm_start(train(tiny_folder, traces, 20, 100), tmp_path / "state.ckpt")
    train(tiny_folder, traces, 20, 60, tmp_path / "state.ckpt")
    first, second = shares[:20], shares[20:]
    assert first == pytest.approx([min(1, (step + 1) / 20) * max(0.1, 1 - step / 20) for step in range(20)])
    assert second == pytest.approx([max(0.1, 1 - step / 40) for step in range(20, 40)])
