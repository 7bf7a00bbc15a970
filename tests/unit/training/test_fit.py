"""Both stages of a fit on a tiny verifier: what they find and train, what a checkpoint holds, and going on from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

from tests.rounding import assert_near, assert_trained_alike
from tests.small_fits import Trainers, fit, learn_gates, small_options, traced
from tests.tiny import EOS, TINY_FAMILIES, VOCAB, TinyFolder, even_costs, tiny_model, transformers_logits, verifier_ref
from tests.toy_part import Constant
from viasd_calib.errors import CalibrationError
from viasd_calib.models import load_verifier
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.parts import mlp_keep
from viasd_calib.slim.parts.adapter import DEFAULT_TARGETS, adapted_layers, adapter_tensors
from viasd_calib.slim.parts.mlp_keep import NarrowMLP
from viasd_calib.slim.parts.skips import skipped_runs
from viasd_calib.spec import AdapterKind, LowBitWeights, Route
from viasd_calib.training import student
from viasd_calib.training.distillation import DistillationModule
from viasd_calib.training.fit import fit_slim_verifier
from viasd_calib.training.gate_learning import GateModule
from viasd_calib.training.losses import LOSSES
from viasd_calib.training.options import RouteChoice, SlimVerifierOptions
from viasd_calib.training.search.record import FoundRoute, SearchResult, SearchSettings, save_search

GIVEN = Route(attention_skip=[1], mlp_skip=[1, 2])


def searched(tiny_folder: TinyFolder, folder: Path, route: Route = GIVEN, **changes: Any) -> Path:
    """What a search for routes of the tiny verifier wrote, with one method's route."""
    found = FoundRoute(
        route=route,
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


SKIPPING = [choice for choice in get_args(RouteChoice) if choice != "whole"]
"""Ways of choosing a route that leave sublayers out, which bridges then replace."""


def options(tiny_folder: TinyFolder, choice: RouteChoice = "gates", **changes: Any) -> SlimVerifierOptions:
    given = {"route_file": str(searched(tiny_folder, tiny_folder)), "route_method": "greedy"}
    return small_options(tiny_folder, choice, **{**(given if choice == "given" else {}), **changes})


def state_in(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def test_a_route_in_low_bits_is_not_given_but_fitted(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    low = GIVEN.model_copy(update={"low_bit": LowBitWeights(mlp={"8": [0], "4": [3]}, head=8)})
    file = searched(tiny_folder, tmp_path, route=low)
    words = (
        r"the route of greedy has low bits, which a fit rounds itself: .* --model.route_choice span and --model.parts "
        r"'\{low_bit: \{bits: 16, attention: \{\}, mlp: \{'8': \[0\], '4': \[3\]\}, head: 8\}\}'"
    )
    with pytest.raises(CalibrationError, match=words):
        fit(options(tiny_folder, "given", route_file=str(file)), traces, tmp_path, steps=1)


def test_gates_first_then_distillation(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    trainers = Trainers(tmp_path)
    module = fit_slim_verifier(options(tiny_folder), traced(traces), trainers, max_steps=5)
    assert [type(trainer.lightning_module) for trainer in trainers.made] == [GateModule, DistillationModule]
    assert [trainer.global_step for trainer in trainers.made] == [3, 2]
    gates = trainers.made[0].lightning_module
    assert isinstance(gates, GateModule)
    assert module.route == gates.route
    cost = float((gates.shares * module.kept).sum() + gates.rest)
    assert cost <= max(0.7, float((gates.shares * gates.always).sum() + gates.rest)) + 1e-5
    assert not {0, 3} & {*module.route.attention_skip, *module.route.mlp_skip}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], "the second stage's checkpoint is the last"


def test_gates_come_to_the_target_cost(tiny_folder: TinyFolder, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The multiplier rises while they cost more, so that what is expected ends near the target."""
    monkeypatch.setattr(student, "sublayer_costs", even_costs)
    gates = learn_gates(options(tiny_folder, route_steps=60), traces, 60)
    assert float(gates.multiplier) > 0
    assert gates.expected_cost().item() == pytest.approx(0.7, abs=0.08)
    assert float((gates.shares * gates.student.kept(gates.route)).sum() + gates.rest) <= 0.7 + 1e-5


def test_fewer_steps_than_the_gates_take_are_refused(tiny_folder: TinyFolder, traces: Path) -> None:
    with pytest.raises(CalibrationError, match=r"max_steps is 2, and the gates alone take route_steps, 3; raise"):
        fit_slim_verifier(options(tiny_folder), traced(traces), Trainers(None), max_steps=2)


def test_a_checkpoint_holds_trainable_state_alone(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    learn_gates(options(tiny_folder), traces, 2, tmp_path / "gates")
    assert state_in(tmp_path / "gates/last.ckpt").keys() == {"gates.log_alpha", "multiplier", "shares", "rest"}
    module = fit(options(tiny_folder), traces, tmp_path, steps=4)
    state = state_in(tmp_path / "last.ckpt")
    others = {name for name in state if "lora_" not in name and not name.startswith("bridges.")}
    assert others == {"kept", "earlier_steps"}
    assert any(name.startswith("bridges.") for name in state)
    adapted = {int(name.split(".")[1]) for name in state if "lora_" in name and ".mlp." in name}
    assert adapted == {0, 1, 2, 3} - {*module.route.mlp_skip}


def test_a_span_is_one_run_of_layers_with_its_bridge(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    module = fit(options(tiny_folder, "span"), traces, tmp_path, steps=1)
    assert module.route.attention_skip == module.route.mlp_skip
    assert len(skipped_runs(module.route)) == 1
    assert module.bridges is not None
    assert [*module.bridges] == [skipped_runs(module.route)[0].name]


def test_a_given_route_is_taken_with_its_bridges(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    module = fit(options(tiny_folder, "given"), traces, tmp_path, steps=1)
    assert module.route == GIVEN
    assert module.bridges is not None
    assert [*module.bridges] == [run.name for run in skipped_runs(GIVEN)]


def test_a_given_route_is_refused_where_it_cannot_be_taken(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    other = searched(tiny_folder, tmp_path, verifier=verifier_ref())
    with pytest.raises(CalibrationError, match="give the file of a search on it"):
        fit(options(tiny_folder, "given", route_file=str(other)), traces, tmp_path, steps=1)
    with pytest.raises(CalibrationError, match="did not run knapsack; choose from greedy"):
        fit(options(tiny_folder, "given", route_method="knapsack"), traces, tmp_path, steps=1)


def test_a_route_without_bridges_has_none(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    for choice in SKIPPING:
        module = fit(options(tiny_folder, choice, bridges=False), traces, tmp_path / choice, steps=4)
        assert module.bridges is None
        assert module.route.mlp_skip


@pytest.mark.parametrize("choice", SKIPPING)
def test_bridges_are_trained_on(choice: RouteChoice, tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    def bridges_after(steps: int) -> dict[str, Tensor]:
        module = fit(options(tiny_folder, choice, bridge_rank=3), traces, tmp_path / str(steps), steps=steps)
        assert module.bridges is not None
        return module.bridges.state_dict()

    one, later = bridges_after(4), bridges_after(8)
    assert one.keys() == later.keys()
    assert all(not torch.equal(one[name], later[name]) for name in one)


@pytest.mark.parametrize("choice", SKIPPING)
def test_bridges_come_back_with_a_checkpoint(
    choice: RouteChoice, tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    first = fit(options(tiny_folder, choice), traces, tmp_path, steps=5)
    second = fit(options(tiny_folder, choice), traces, tmp_path, steps=5, resume=str(tmp_path / "last.ckpt"))
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
    module = fit(options(tiny_folder, choice, mlp_keep=0.6), traces, tmp_path, steps=5)
    assert {layer: kept.keep for layer, kept in module.student.widths.items()} == {1: 19, 2: 19}
    assert module.slim_layers is not None
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in adapter_tensors(module.slim_layers).items()
        if "down_proj.lora_A" in name
    }
    assert [shapes[f"{layer}.mlp.down_proj.lora_A.default.weight"] for layer in range(4)] == [
        (2, 32), (2, 19), (2, 19), (2, 32)
    ]  # fmt: skip
    narrow = [layer.mlp for layer in module.student.model.slim_layers]
    assert [isinstance(mlp, NarrowMLP) for mlp in narrow] == [False, True, True, False]
    ids = [5, 1, 17, 3]
    found = transformers_logits(module.student.model.model, ids)
    expected = transformers_logits(load_verifier(str(tiny_folder)).model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_further_parts_are_trained_on_and_come_back_with_a_checkpoint(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path
) -> None:
    """A part of a file of tests stands where bridges would; it is fitted before the first step, and then distilled."""
    means = options(tiny_folder, "given", bridges=False, adapter_rank=0, parts={"mean_update": {"scale": 0.5}})
    fitted, trained = (fit(means, traces, tmp_path / str(steps), steps=steps) for steps in (0, 8))
    names = [run.name for run in skipped_runs(GIVEN)]
    assert [type(one.layer) for one in trained.sublayers() if one.kind == "bridge"] == [Constant] * len(names)
    before, after = fitted.further.state_dict(), trained.further.state_dict()
    assert [*after] == [f"mean_update.{name}.update" for name in names]
    assert all(not torch.equal(before[name], after[name]) for name in after)
    again = fit(means, traces, tmp_path / "again", steps=8, resume=str(tmp_path / "8/last.ckpt"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.further.state_dict().items())
    torch.testing.assert_close(before, after, atol=0.01, rtol=0)  # closed form, and small steps from it


def test_orders_of_neurons_come_back_with_a_checkpoint(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is ranked again; neurons, and the adapter on them, are those of the first run."""
    first = fit(options(tiny_folder, "span", mlp_keep=0.6), traces, tmp_path, steps=4)
    assert not torch.equal(first.neuron_orders, torch.arange(32).repeat(2, 1))
    monkeypatch.setattr(mlp_keep, "rank_neurons", lambda *_: pytest.fail("neurons were ranked again"))
    second = fit(
        options(tiny_folder, "span", mlp_keep=0.6), traces, tmp_path, steps=4, resume=str(tmp_path / "last.ckpt")
    )
    assert torch.equal(second.neuron_orders, first.neuron_orders)
    one, other = (
        module.student.model.slim_layers[1].mlp.down_proj.weight  # type: ignore[union-attr]
        for module in (first, second)
    )
    assert torch.equal(one, other)  # type: ignore[arg-type]
    expected = first.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.state_dict().items())


def test_a_target_that_narrow_mlps_meet_skips_nothing(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = SublayerCosts(torch.full((8,), 0.08), 0.05)
    monkeypatch.setattr(student, "sublayer_costs", lambda _: costs)
    module = fit(options(tiny_folder, "span", mlp_keep=0.6, keep_layers=()), traces, tmp_path, steps=2)
    assert module.route == Route()
    assert len(module.student.widths) == 4


@pytest.mark.parametrize("stopped", [2, 5], ids=["gates", "distillation"])
def test_either_stage_is_resumed(stopped: int, tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        left = stopped

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1

    torch.manual_seed(0)
    whole = fit(options(tiny_folder), traces, tmp_path / "whole", steps=6)
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        fit(options(tiny_folder), traces, tmp_path / "cut", steps=6, callbacks=[Stop()])
    trainers = Trainers(tmp_path / "cut")
    rest = fit_slim_verifier(
        options(tiny_folder), traced(traces), trainers, max_steps=6, ckpt_path=tmp_path / "cut/last.ckpt"
    )
    assert [trainer.global_step for trainer in trainers.made] == ([3, 3] if stopped == 2 else [3])
    assert rest.route == whole.route


def test_another_checkpoint_is_refused(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CalibrationError, match="is no checkpoint of viasd fit"):
        fit(options(tiny_folder), traces, tmp_path, steps=4, resume=str(tmp_path / "other.ckpt"))
    fit(options(tiny_folder, "span"), traces, tmp_path, steps=1)
    with pytest.raises(CalibrationError, match="does not fit these options: missing"):
        fit(
            options(tiny_folder, "span", adapter_kind="norms"),
            traces,
            tmp_path,
            steps=2,
            resume=str(tmp_path / "last.ckpt"),
        )


def test_the_adapter_learns(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    module = fit(options(tiny_folder), traces, tmp_path, steps=8)
    assert module.slim_layers is not None
    moved = [p for name, p in module.slim_layers.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert moved


def test_the_verifier_does_not_move(tiny_folder: TinyFolder, traces: Path, tmp_path: Path) -> None:
    before = load_verifier(str(tiny_folder)).model.state_dict()
    module = fit(options(tiny_folder), traces, tmp_path, steps=6)
    after = module.student.model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_output_tokens_are_frequent_ones_and_those_that_end_a_text(tiny_folder: TinyFolder) -> None:
    verifier = load_verifier(str(tiny_folder))
    ids = student.Student(verifier, options(tiny_folder, head_vocab=4)).head_ids(Counter({9: 5, 8: 4, 11: 3, 7: 1}))
    assert ids is not None
    assert ids.tolist() == [EOS, 8, 9, 11]
    assert student.Student(verifier, options(tiny_folder)).head_ids(Counter({9: 5})) is None


@pytest.mark.parametrize("size", [1, VOCAB + 1])
def test_an_output_vocabulary_that_cannot_be_is_refused_before_training(
    tiny_folder: TinyFolder, traces: Path, size: int
) -> None:
    with pytest.raises(CalibrationError, match=rf"head_vocab is {size}; give 2 to {VOCAB} tokens"):
        learn_gates(options(tiny_folder, head_vocab=size), traces, 1)
    with pytest.raises(CalibrationError, match="head_vocab is -1; give a whole number, at least 0"):
        options(tiny_folder, head_vocab=-1)


@pytest.mark.parametrize("objective", LOSSES)
def test_both_stages_minimise_the_objective(objective: str, tiny_folder: TinyFolder, traces: Path) -> None:
    trainers = Trainers(None)
    fit_slim_verifier(options(tiny_folder, objective=objective), traced(traces), trainers, max_steps=5)
    for trainer, name in zip(trainers.made, ("route", "adapter"), strict=True):
        logged = trainer.callback_metrics.keys()
        assert f"{name}_{objective}" in logged
        assert not [one for one in logged for other in LOSSES if other != objective and other in one]


def test_objectives_teach_different_things(tiny_folder: TinyFolder, traces: Path) -> None:
    learned = []
    for objective in LOSSES:
        module = learn_gates(options(tiny_folder, objective=objective), traces, 2)
        assert module.gates is not None
        learned.append(module.gates.log_alpha.detach())
    assert not any(torch.equal(one, other) for place, one in enumerate(learned) for other in learned[:place])


def test_validation_between_two_steps_changes_nothing(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "sublayer_costs", even_costs)
    often: dict[str, Any] = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    for name, settings in (("often", often), ("rarely", {})):
        torch.manual_seed(0)
        fit(options(tiny_folder, accumulate=3), traces, tmp_path / name, steps=5, **settings)
    torch.manual_seed(0)
    fit(options(tiny_folder, accumulate=3), traces, tmp_path / "began", steps=3)
    assert_trained_alike(*(state_in(tmp_path / name / "last.ckpt") for name in ("often", "rarely")), {})


def test_a_step_takes_the_mean_of_its_batches(
    tiny_folder: TinyFolder, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of three batches, each taken alone from the same start, against that of one step of three."""
    monkeypatch.setattr(student, "sublayer_costs", even_costs)
    monkeypatch.setattr(GateModule, "target_now", lambda _: 0.7)
    alone: list[Tensor] = []
    together: list[Tensor] = []

    class Note(Callback):
        def __init__(self, kept: list[Tensor]) -> None:
            self.kept = kept

        def on_before_optimizer_step(self, _trainer: Trainer, module: Any, _optimizer: Any) -> None:
            self.kept.append(module.gates.log_alpha.grad.clone())

    frozen = options(tiny_folder, route_learning_rate=0.0, cost_learning_rate=0.0)
    for batches, kept in ((1, alone), (3, together)):
        settings = {"accumulate_grad_batches": batches, "limit_train_batches": 3}
        learn_gates(frozen, traces, 3 // batches, callbacks=[Note(kept)], **settings)
    assert_near(together[0], torch.stack(alone).mean(0))


def test_the_schedule_counts_steps_not_batches(tiny_folder: TinyFolder, traces: Path) -> None:
    for steps, epochs, expected in ((-1, 2, 4), (3, 2, 3), (9, 2, 4), (9, -1, 9)):
        trainers = Trainers(None, max_epochs=epochs, limit_train_batches=4)
        fit_slim_verifier(options(tiny_folder, "span", accumulate=2), traced(traces), trainers, max_steps=steps)
        (trainer,) = trainers.made
        assert trainer.global_step == trainer.estimated_stepping_batches == expected


def test_nothing_is_trained_where_there_is_nothing_to_train(tiny_folder: TinyFolder, traces: Path) -> None:
    for choice in ("span", "gates"):
        bare = options(tiny_folder, choice, adapter_rank=0, bridges=False)
        module = fit_slim_verifier(bare, traced(traces), Trainers(None), max_steps=5)
        assert module.route.mlp_skip
        assert module.bridges is None
        assert module.slim_layers is None


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
        torch.manual_seed(0)
        module = fit(options(tiny_folder, "span", cache_gib=cache_gib), traces, tmp_path / str(cache_gib), steps=8)
        states.append(adapter_tensors(module.slim_layers))  # type: ignore[arg-type]
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-4), name


@pytest.mark.parametrize("kind", ["dora", "norms"])
def test_other_kinds_of_adapters_learn_and_are_kept(
    tiny_folder: TinyFolder, traces: Path, tmp_path: Path, kind: AdapterKind
) -> None:
    chosen = options(tiny_folder, "span", adapter_kind=kind)
    first = fit(chosen, traces, tmp_path, steps=2)
    again = fit(chosen, traces, tmp_path / "again", steps=2, resume=str(tmp_path / "last.ckpt"))
    begun = adapted_layers(first.student.model.layers, chosen.rank, chosen.adapter_alpha, chosen.targets, kind)
    before = adapter_tensors(begun)
    learned, resumed = (dict(module.named_parameters()) for module in (first, again))
    names = [name for name in learned if name.partition(".")[2] in before and learned[name].requires_grad]
    assert names
    assert any(not torch.equal(learned[name], before[name.partition(".")[2]]) for name in names if "lora_A" not in name)
    assert all(torch.equal(learned[name], resumed[name]) for name in names)
