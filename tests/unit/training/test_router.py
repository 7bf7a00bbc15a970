"""The router on a tiny verifier: stages, what a checkpoint holds, and going on from it."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from tests.rounding import assert_near, assert_trained_alike
from tests.tiny import EOS, TINY_FAMILIES, VOCAB, TinyFolder, even_costs, tiny_model, transformers_logits, verifier_ref
from viasd_calib.errors import CalibrationError, TraceError
from viasd_calib.models import load_verifier
from viasd_calib.prompts import SplitShares
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.parts.adapter import DEFAULT_TARGETS, adapted_layers, adapter_tensors
from viasd_calib.slim.parts.mlp_keep import NarrowMLP
from viasd_calib.slim.parts.skips import skipped_runs
from viasd_calib.spec import AdapterKind, Route
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training import router as routing
from viasd_calib.training.objectives import OBJECTIVES, Objective
from viasd_calib.training.router import RouteChoice, RouterModule, check_trainer
from viasd_calib.training.search.record import FoundRoute, SearchResult, SearchSettings, save_search

SHARES = SplitShares(fit=1.0, calibrate=0.0, test=0.0)


GIVEN = Route(attention_skip=[1], mlp_skip=[1, 2])


def searched(tiny_folder: TinyFolder, folder: Path, **changes: Any) -> Path:
    """What a search for routes of the tiny verifier wrote, with one method's route."""
    found = FoundRoute(
        route=GIVEN,
        agreement=0.5,
        agreement_confident={},
        kl=1,
        expected_cost=0.7,
        relative_cost=0.7,
        passes=1,
        seconds=1,
    )
    entries: dict[str, Any] = {"verifier": load_verifier(str(tiny_folder)).ref, **changes}
    result = SearchResult(
        settings=SearchSettings(methods=("greedy",)), bridge_texts=1, judging_texts=1, held_back_texts=1,
        prompts_sha256="a" * 64, found={"greedy": found}, **entries,
    )  # fmt: skip
    save_search(result, folder / "search.json")
    return folder / "search.json"


def router(tiny_folder: TinyFolder, choice: RouteChoice = "gates", **changes: Any) -> RouterModule:
    entries: dict[str, Any] = {"target_cost": 0.7, "route_steps": 3, "adapter_rank": 2, "max_run": 4, **changes}
    if choice == "given":
        entries = {
            "route_file": str(searched(tiny_folder, tiny_folder)), "route_method": "greedy", **entries
        }  # fmt: skip
    return RouterModule(str(tiny_folder), route_choice=choice, **entries)


def fit(
    module: RouterModule, traces: Path, folder: Path, steps: int, resume: str | None = None, **settings: Any
) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        max_epochs=settings.pop("max_epochs", 100),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        callbacks=[
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0),
            *settings.pop("callbacks", []),
        ],
        **settings,
    )
    trainer.fit(
        module, datamodule=TraceDataModule([str(traces)], shares=SHARES, max_batch_tokens=128), ckpt_path=resume
    )
    return trainer


def test_route_first_then_adapter(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    module = router(tiny_folder)
    fit(module, traces, tmp_path, steps=3)
    assert module.stage == "adapter"
    cost = float((module.costs * module.kept).sum() + module.rest_cost)
    always = float((module.costs * module._always()).sum() + module.rest_cost)
    assert cost <= max(0.7, always) + 1e-5
    assert 0 not in module.route.attention_skip + module.route.mlp_skip
    assert 3 not in module.route.attention_skip + module.route.mlp_skip


def test_a_checkpoint_holds_trainable_state_alone(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    fit(router(tiny_folder), traces, tmp_path, steps=4)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    others = {name for name in state if "lora_" not in name and not name.startswith("bridges.")}
    assert others == {"gates.log_alpha", "multiplier", "kept", "steps_done", "costs", "rest_cost"}
    assert any(name.startswith("bridges.") for name in state)


def test_a_span_is_one_run_of_layers_with_its_bridge(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    module = router(tiny_folder, "span")
    fit(module, traces, tmp_path, steps=1)
    assert module.stage == "adapter"
    assert module.route.attention_skip == module.route.mlp_skip
    assert len(skipped_runs(module.route)) == 1
    assert module.bridges is not None
    assert [*module.bridges] == [skipped_runs(module.route)[0].name]


def test_a_given_route_is_taken_with_its_bridges(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    module = router(tiny_folder, "given")
    fit(module, traces, tmp_path, steps=1)
    assert module.route == GIVEN
    assert module.bridges is not None
    assert [*module.bridges] == [run.name for run in skipped_runs(GIVEN)]


def test_a_given_route_is_refused_where_it_cannot_be_taken(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    other = searched(tiny_folder, tmp_path, verifier=verifier_ref())
    with pytest.raises(CalibrationError, match="give the file of a search on it"):
        fit(router(tiny_folder, "given", route_file=str(other)), traces, tmp_path, steps=1)
    with pytest.raises(CalibrationError, match="did not run knapsack; choose from greedy"):
        fit(router(tiny_folder, "given", route_method="knapsack"), traces, tmp_path, steps=1)


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
        RouterModule(**options)


def test_a_route_without_bridges_has_none(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    for choice in get_args(RouteChoice):
        module = router(tiny_folder, choice, bridges=False)
        fit(module, traces, tmp_path / choice, steps=4)
        assert module.bridges is None
        assert module.route.mlp_skip


@pytest.mark.parametrize("choice", get_args(RouteChoice))
def test_bridges_are_trained_on(choice: RouteChoice, tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    def bridges_after(steps: int) -> dict[str, Tensor]:
        module = router(tiny_folder, choice, bridge_rank=3)
        fit(module, traces, tmp_path / str(steps), steps=steps)
        assert module.bridges is not None
        return module.bridges.state_dict()

    one, later = bridges_after(4), bridges_after(8)
    assert one.keys() == later.keys()
    assert all(not torch.equal(one[name], later[name]) for name in one)


@pytest.mark.parametrize("choice", get_args(RouteChoice))
def test_bridges_come_back_with_a_checkpoint(
    choice: RouteChoice, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    first = router(tiny_folder, choice)
    fit(first, traces, tmp_path, steps=5)
    second = router(tiny_folder, choice)
    fit(second, traces, tmp_path, steps=5, resume=str(tmp_path / "last.ckpt"))
    assert first.bridges is not None
    assert second.bridges is not None
    assert second.route == first.route
    expected = first.bridges.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.bridges.state_dict().items())


@pytest.mark.parametrize("choice", get_args(RouteChoice))
def test_kept_mlps_are_narrow_but_those_of_layers_that_stay(
    choice: RouteChoice, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    """Costs, route and adapter are those of narrow MLPs, and the verifier says what it said."""
    module = router(tiny_folder, choice, mlp_keep=0.6)
    fit(module, traces, tmp_path, steps=5)
    assert {layer: kept.keep for layer, kept in module.widths.items()} == {1: 19, 2: 19}
    assert module.slim_layers is not None
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in adapter_tensors(module.slim_layers).items()
        if "down_proj.lora_A" in name
    }
    assert [shapes[f"{layer}.mlp.down_proj.lora_A.default.weight"] for layer in range(4)] == [
        (2, 32), (2, 19), (2, 19), (2, 32)
    ]  # fmt: skip
    narrow = [sublayer.layer.mlp for sublayer in module.model.slim_sublayers if sublayer.kind == "mlp"]
    assert [isinstance(mlp, NarrowMLP) for mlp in narrow] == [False, True, True, False]
    ids = [5, 1, 17, 3]
    found = transformers_logits(module.model.model, ids)
    expected = transformers_logits(load_verifier(str(tiny_folder)).model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_orders_of_neurons_come_back_with_a_checkpoint(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is ranked again; neurons, and the adapter on them, are those of the first run."""
    first = router(tiny_folder, "span", mlp_keep=0.6)
    fit(first, traces, tmp_path, steps=4)
    assert not torch.equal(first.neuron_orders, torch.arange(32).repeat(2, 1))
    monkeypatch.setattr(routing, "rank_neurons", lambda *_: pytest.fail("neurons were ranked again"))
    second = router(tiny_folder, "span", mlp_keep=0.6)
    second.resumes = True
    fit(second, traces, tmp_path, steps=4, resume=str(tmp_path / "last.ckpt"))
    assert torch.equal(second.neuron_orders, first.neuron_orders)
    one, other = (
        module.model.slim_layers[1].mlp.down_proj.weight  # type: ignore[union-attr]
        for module in (first, second)
    )
    assert torch.equal(one, other)  # type: ignore[arg-type]
    assert first.slim_layers is not None
    assert second.slim_layers is not None
    expected = adapter_tensors(first.slim_layers)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_tensors(second.slim_layers).items())


def test_a_target_that_narrow_mlps_meet_skips_nothing(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = SublayerCosts(torch.full((8,), 0.08), 0.05)
    monkeypatch.setattr(routing, "sublayer_costs", lambda _: costs)
    module = router(tiny_folder, "span", mlp_keep=0.6, keep_layers=())
    fit(module, traces, tmp_path, steps=2)
    assert module.route == Route()
    assert len(module.widths) == 4


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_of_neurons_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(CalibrationError, match=rf"mlp_keep is {share}; give a share of neurons"):
        RouterModule(mlp_keep=share)


def test_resuming_goes_on_where_it_stopped(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    first = router(tiny_folder)
    fit(first, traces, tmp_path, steps=4)
    assert first.gates is not None
    second = router(tiny_folder)
    fit(second, traces, tmp_path, steps=6, resume=str(tmp_path / "last.ckpt"))
    assert second.gates is not None
    assert int(second.steps_done) == 6
    assert torch.equal(second.gates.log_alpha, first.gates.log_alpha)  # the route's stage was over
    assert torch.equal(second.kept, first.kept)
    assert torch.equal(second.costs, first.costs)  # measured once, kept in the checkpoint


def test_the_adapter_learns(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    module = router(tiny_folder)
    fit(module, traces, tmp_path, steps=8)
    assert module.slim_layers is not None
    moved = [p for name, p in module.slim_layers.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert moved


def test_the_verifier_does_not_move(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    before = load_verifier(str(tiny_folder)).model.state_dict()
    module = router(tiny_folder)
    fit(module, traces, tmp_path, steps=6)
    after = module.model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_output_tokens_are_frequent_ones_and_those_that_end_a_text(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    module = RouterModule(str(tiny_folder), route_choice="gates", route_steps=3, adapter_rank=0, head_vocab=4)
    fit(module, traces, tmp_path, steps=1)
    ids = module.head_ids(Counter({9: 5, 8: 4, 11: 3, 7: 1}))
    assert ids is not None
    assert ids.tolist() == [EOS, 8, 9, 11]
    assert router(tiny_folder).head_ids(Counter({9: 5})) is None


@pytest.mark.parametrize("size", [-1, 1, VOCAB + 1])
def test_an_output_vocabulary_that_cannot_be_is_refused_before_training(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, size: int
) -> None:
    module = RouterModule(str(tiny_folder), head_vocab=size)
    with pytest.raises(CalibrationError, match=rf"head_vocab is {size}; give 2 to {VOCAB} tokens"):
        fit(module, traces, tmp_path, steps=1)
    assert module.gates is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_stages_minimise_the_objective(
    objective: Objective, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    module = router(tiny_folder, objective=objective)
    trainer = fit(module, traces, tmp_path, steps=5)
    assert {f"route_{objective}", f"adapter_{objective}"} <= trainer.callback_metrics.keys()
    assert not [
        name for name in trainer.callback_metrics for other in OBJECTIVES if other != objective and other in name
    ]


def test_objectives_teach_different_things(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    learned = []
    for objective in get_args(Objective):
        module = router(tiny_folder, objective=objective)
        torch.manual_seed(0)
        fit(module, traces, tmp_path / objective, steps=2)
        assert module.gates is not None
        learned.append(module.gates.log_alpha.detach())
    assert not any(torch.equal(one, other) for one, other in combinations(learned, 2))


class Halfway(Callback):
    """Saves after each batch, and notes how many steps were made by then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        trainer.save_checkpoint(self.folder / f"{len(self.steps)}.ckpt")


def learned_state(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def test_a_run_that_stopped_between_two_steps_goes_on_there(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of three batches; batch 5 lies in the route's stage, batch 14 in the adapter's and after an epoch."""
    monkeypatch.setattr(routing, "sublayer_costs", even_costs)
    saves = Halfway(tmp_path)
    torch.manual_seed(0)
    fit(router(tiny_folder, accumulate=3), traces, tmp_path / "whole", steps=6, callbacks=[saves])
    assert saves.steps == [batch // 3 for batch in range(1, 19)]
    began = learned_state(tmp_path / "1.ckpt")  # before the first step
    for stopped in (5, 14):
        checkpoint = tmp_path / f"{stopped}.ckpt"
        assert torch.load(checkpoint, weights_only=True)["gathered"]["batches"] == stopped % 3
        folder = tmp_path / f"from-{stopped}"
        fit(router(tiny_folder, accumulate=3), traces, folder, steps=6, resume=str(checkpoint))
        assert_trained_alike(learned_state(folder / "last.ckpt"), learned_state(tmp_path / "whole/last.ckpt"), began)
    assert "gathered" not in torch.load(tmp_path / "6.ckpt", weights_only=True), "a whole step"


def test_validation_between_two_steps_changes_nothing(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "sublayer_costs", even_costs)
    often: dict[str, Any] = {"val_check_interval": 1, "check_val_every_n_epoch": None, "callbacks": [Halfway(tmp_path)]}
    for name, settings in (("often", often), ("rarely", {})):
        torch.manual_seed(0)
        fit(router(tiny_folder, accumulate=3), traces, tmp_path / name, steps=5, **settings)
    states = (learned_state(tmp_path / name) for name in ("often/last.ckpt", "rarely/last.ckpt", "1.ckpt"))
    assert_trained_alike(*states)


def test_a_step_takes_the_mean_of_its_batches(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of three batches, each taken alone from the same start, against that of one step of three."""
    monkeypatch.setattr(routing, "sublayer_costs", even_costs)
    alone: list[Tensor] = []
    together: list[Tensor] = []

    for accumulate, kept in ((1, alone), (3, together)):
        module = router(tiny_folder, accumulate=accumulate, route_steps=50)

        def note(_optimizer: Any, module: RouterModule = module, kept: list[Tensor] = kept) -> None:
            kept.append(module._gradients()["gates.log_alpha"].clone())

        monkeypatch.setattr(module, "_route_step", note)
        monkeypatch.setattr(module, "_target_now", lambda: 0.7)
        fit(module, traces, tmp_path / str(accumulate), steps=-1, max_epochs=1, limit_train_batches=3)
    assert_near(together[0], torch.stack(alone).mean(0))


def test_the_schedule_counts_steps_not_batches(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    for steps, epochs, expected in ((-1, 2, 4), (3, 2, 3), (9, 2, 4), (9, -1, 9)):
        module = router(tiny_folder, accumulate=2)
        trainer = fit(module, traces, tmp_path, steps=steps, max_epochs=epochs, limit_train_batches=4)
        assert trainer.global_step == module._all_steps() == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"accumulate": 0}, "accumulate is 0; give 1"), ({"objective": "l2"}, "objective is 'l2'; give one of kl, ")],
)
def test_an_entry_that_cannot_be_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        RouterModule(**entry)


def test_processes_under_another_strategy_are_refused() -> None:
    module = RouterModule()
    module._trainer = SimpleNamespace(world_size=2, strategy=FSDPStrategy(), callbacks=[])  # type: ignore[assignment]
    with pytest.raises(CalibrationError, match=r"FSDPStrategy cannot train the router.*set trainer.strategy to ddp"):
        module.configure_model()


def test_a_search_for_one_learning_rate_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"LearningRateFinder sets one rate.*leave it out"):
        check_trainer(Trainer(accelerator="cpu", logger=False, callbacks=[LearningRateFinder()]))


@pytest.mark.parametrize("cost", [0.0, -1.0, 1.5])
def test_a_cost_beyond_reach_is_refused(cost: float) -> None:
    with pytest.raises(CalibrationError, match="target_cost"):
        RouterModule(target_cost=cost)


def test_a_split_without_texts_is_refused(traces: Path) -> None:
    data = TraceDataModule([str(traces)], split="test", shares=SHARES)
    with pytest.raises(TraceError, match="no text of the split 'test'"):
        data.setup()


def test_held_back_texts_are_no_training_texts(traces: Path) -> None:
    data = TraceDataModule([str(traces)], shares=SHARES, validation_share=0.3)
    data.setup()
    fitted = {text.prompt_sha256 for text in data.training_texts()}
    held = {text.prompt_sha256 for text in data.validation_texts()}
    assert fitted
    assert held
    assert not fitted & held


def test_batches_hold_every_text_once_within_the_limit(traces: Path) -> None:
    data = TraceDataModule([str(traces)], shares=SHARES, validation_share=0.0, max_batch_tokens=100)
    data.setup()
    seen: list[int] = []
    for batch in data.train_dataloader():
        assert batch.ids.numel() <= 100 or len(batch.indices) == 1
        assert int(batch.predicts.sum()) == len(batch.q_ids)
        nexts = batch.ids[:, 1:][batch.predicts[:, :-1]]
        assert torch.equal(nexts, batch.q_ids[:, 0])  # greedy texts: the token after a place is q's likeliest
        seen += batch.indices
    assert sorted(seen) == [text.index for text in data.training_texts()]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_an_adapter_reaches_what_every_family_projects_with(family: str) -> None:
    layers = adapted_layers(tiny_model(0, family).get_decoder().layers[:1], 2, 4, DEFAULT_TARGETS["lora"])
    adapted = {name.split(".")[2] for name in adapter_tensors(layers)}
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert adapted == (
        fused if family.startswith("phi3") else set(DEFAULT_TARGETS["lora"]) - {"qkv_proj", "gate_up_proj"}
    )


def test_a_remembered_text_trains_as_one_that_is_read(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    states = []
    for cache_gib in (0.0, 1.0):
        module = router(tiny_folder, "span", cache_gib=cache_gib)
        torch.manual_seed(0)
        fit(module, traces, tmp_path / str(cache_gib), steps=8)  # more than an epoch
        states.append(adapter_tensors(module.slim_layers))  # type: ignore[arg-type]
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-4), name


@pytest.mark.parametrize("kind", ["dora", "norms"])
def test_other_kinds_of_adapters_learn_and_are_kept(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, kind: AdapterKind
) -> None:
    first = router(tiny_folder, "span", adapter_kind=kind)
    fit(first, traces, tmp_path, steps=2)
    again = router(tiny_folder, "span", adapter_kind=kind)
    again.resumes = True
    fit(again, traces, tmp_path / "again", steps=2, resume=str(tmp_path / "last.ckpt"))
    begun = adapted_layers(first.model.layers, first.adapter_rank, first.adapter_alpha, first.adapter_targets, kind)
    before, learned, resumed = (
        adapter_tensors(one)
        for one in (begun, first.slim_layers, again.slim_layers)  # type: ignore[arg-type]
    )
    assert learned.keys() == before.keys() == resumed.keys()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learned.items() if "lora_A" not in name)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in learned.items())
