"""Every way of choosing a route, on tiny verifiers."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from itertools import combinations
from typing import get_args

import pytest
import torch

from tests.rounding import assert_near
from tests.tiny import tiny_model, tiny_texts
from tests.tiny.bits import priced
from viasd_calib.choices import LowBitMethod, SearchMethod, SkippingMethod
from viasd_calib.errors import CalibrationError
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.slim.parts import low_bit
from viasd_calib.slim.parts.bridges import fit_bridges
from viasd_calib.slim.parts.skips import skipped_numbers
from viasd_calib.spec import LowBitWeights, Route
from viasd_calib.training.losses.margin import margin_cost
from viasd_calib.training.search import bridges as search_bridges
from viasd_calib.training.search.ablation import ablation_losses, ablation_order, greedy_removal, knapsack
from viasd_calib.training.search.baselines import best_random, best_span, evenly_spaced
from viasd_calib.training.search.bridges import BridgeFitter, all_streams
from viasd_calib.training.search.dimr import BAYES_EVERY, dimr
from viasd_calib.training.search.evaluator import RouteEvaluator, cache_texts
from viasd_calib.training.search.methods import CHOICES
from viasd_calib.training.search.similarity import cosines, most_alike
from viasd_calib.training.search.space import SearchSpace, whole
from viasd_calib.training.spans import route_divergences, span_routes

ATTENTION, MLP, REST = 0.06, 0.12, 0.1
LAYERS = 5


def new_space(target: float = 0.6, always: tuple[int, ...] = (0,)) -> SearchSpace:
    return SearchSpace(SublayerCosts(torch.tensor([ATTENTION, MLP] * LAYERS), REST), target, always)


def verifier() -> RoutedModel:
    return RoutedModel(tiny_model(layers=LAYERS))


def new_evaluator(budget: int, bridged: bool = False, model: RoutedModel | None = None) -> RouteEvaluator:
    model = model or verifier()
    texts = tiny_texts(24, model=model)
    fitter = BridgeFitter(model, all_streams(model, texts[4:], read_residuals)) if bridged else None
    return RouteEvaluator(model, cache_texts(model, texts[:4]), budget, fitter)


@pytest.mark.parametrize("bridged", [True, False])
@pytest.mark.parametrize("method", get_args(SkippingMethod))
def test_a_choice_keeps_to_target_layers_budget_and_seed(method: SearchMethod, bridged: bool) -> None:
    space, budget = new_space(0.65, always=(0, 3)), 14
    routes = []
    for _ in range(2):
        evaluator = new_evaluator(budget, bridged)
        routes.append(CHOICES[method](space, evaluator, 3))
        assert evaluator.spent <= budget
    assert routes[0] == routes[1]
    skipped = skipped_numbers(routes[0])
    assert space.meets(skipped)
    assert not {number // 2 for number in skipped} & {0, 3}


EVERY = [*range(LAYERS)]


def test_low_bits_are_of_what_the_route_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    space, found, spent = new_space(0.6), {}, {}
    for method in get_args(LowBitMethod):
        evaluator = new_evaluator(14)
        found[method] = CHOICES[method](space, evaluator, 3)
        spent[method] = evaluator.spent
    low = {method: route.low_bit for method, route in found.items()}
    assert low["bits_8"] == LowBitWeights(attention={"8": EVERY}, mlp={"8": EVERY}, head=8)
    assert low["bits_4_mlp"] == LowBitWeights(attention={"8": EVERY}, mlp={"4": EVERY}, head=8)
    both = found["bits_8_span"]
    assert 0.6 < space.cost(skipped_numbers(both)) <= 0.8
    assert both.low_bit is not None
    assert [*both.low_bit.bits("mlp")] == [layer for layer in EVERY if layer not in both.mlp_skip]
    chosen = low["bits_auto"]
    assert chosen is not None
    assert {*chosen.bits("mlp").values()} == {8}, "the budget holds no passes for 4"
    assert spent == {**spent, "bits_8": 0, "bits_4_mlp": 0, "bits_auto": 2 * LAYERS + 1}
    with pytest.raises(CalibrationError, match="raise budget to 11"):
        CHOICES["bits_auto"](space, new_evaluator(10), 3)
    evaluator = new_evaluator(22)
    wide = CHOICES["bits_auto"](new_space(0.4), evaluator, 3).low_bit
    assert evaluator.spent == 22
    assert wide is not None
    assert 4 in {wide.head, *wide.bits("mlp").values(), *wide.bits("attention").values()}


def test_a_budget_that_is_spent_is_refused() -> None:
    seen: list[int] = []
    evaluator = new_evaluator(2)
    evaluator = RouteEvaluator(evaluator.model, evaluator.texts, 2, on_pass=lambda: seen.append(1))
    evaluator.loss(Route(mlp_skip=[1]))
    evaluator.spend()
    with pytest.raises(CalibrationError, match="1 passes, 0 of 2 are left; raise budget to 3"):
        evaluator.loss(Route(mlp_skip=[1]))
    assert len(seen) == evaluator.spent == 2


@pytest.mark.parametrize("choice", [ablation_order, greedy_removal, knapsack, best_span])
def test_what_the_budget_cannot_hold_is_refused_before_the_first_pass(choice: Callable[..., Route]) -> None:
    evaluator = new_evaluator(1)
    with pytest.raises(CalibrationError, match="raise budget to"):
        choice(new_space(), evaluator, 0)
    assert evaluator.spent == 0


def test_a_route_is_evaluated_with_its_bridges() -> None:
    model = verifier()
    texts = tiny_texts(24, model=model)
    route = Route(attention_skip=[1, 2], mlp_skip=[1])
    (bridges,) = fit_bridges(model, [route], texts[4:], read_residuals)
    kept = [sublayers_of(model.layers, model.layer_types, route, one) for one in (bridges, None)]
    for bridged, divergence in zip((True, False), route_divergences(model, kept, texts[:4]), strict=True):
        assert new_evaluator(1, bridged).loss(route) == pytest.approx(divergence, rel=1e-4)


def test_a_run_is_fitted_once_for_all_routes_that_leave_it_out() -> None:
    model = verifier()
    fitter = BridgeFitter(model, all_streams(model, tiny_texts(3, model=model), read_residuals))
    one = fitter.fit(Route(attention_skip=[1], mlp_skip=[3]))
    other = fitter.fit(Route(attention_skip=[1, 2]))
    assert one["attention_1"] is other["attention_1"]
    assert [*one] == ["attention_1", "mlp_3"]


def test_no_more_bridges_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_bridges, "KEPT_BRIDGES", 2)
    model = verifier()
    fitter = BridgeFitter(model, all_streams(model, tiny_texts(3, model=model), read_residuals))
    first, kept = (fitter.fit(Route(mlp_skip=[layer])) for layer in (0, 1))
    fitter.fit(Route(mlp_skip=[2]))
    assert fitter.fit(Route(mlp_skip=[1]))["mlp_1"] is kept["mlp_1"]
    again = fitter.fit(Route(mlp_skip=[0]))["mlp_0"]
    assert again is not first["mlp_0"]
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), first.parameters(), strict=True))


def planted(layer: int) -> RoutedModel:
    """A verifier one of whose layers does nothing."""
    model = copy.deepcopy(tiny_model(layers=LAYERS))
    found = model.get_decoder().layers[layer]
    found.self_attn.o_proj.weight.zero_()
    found.mlp.down_proj.weight.zero_()
    return RoutedModel(model)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("choice", [ablation_order, greedy_removal, knapsack, best_span, most_alike])
def test_a_layer_that_does_nothing_is_found(choice: Callable[..., Route], layer: int) -> None:
    space = new_space(1 - ATTENTION - MLP)
    route = choice(space, new_evaluator(20, model=planted(layer)), 0)
    assert skipped_numbers(route) == whole([layer])


def test_greedy_removal_with_budget_enough_tries_all_that_are_left() -> None:
    space = new_space(0.7)
    found = skipped_numbers(greedy_removal(space, new_evaluator(200), 0))
    evaluator, skipped, loss = new_evaluator(200), [], 0.0
    while not space.meets(skipped):
        left = [number for number in space.free if number not in skipped]
        losses = {number: evaluator.loss(space.route([*skipped, number])) for number in left}
        best = min(left, key=lambda number: (losses[number] - loss) / space.share(number))
        skipped.append(best)
        loss = losses[best]
    assert found == sorted(skipped)


def test_greedy_removal_goes_on_where_its_budget_ends() -> None:
    space = new_space(0.4)
    evaluator = new_evaluator(len(space.free))
    assert space.meets(skipped_numbers(greedy_removal(space, evaluator, 0)))
    assert evaluator.left == 0


def test_the_knapsack_loses_least_of_all_routes_that_meet_the_target() -> None:
    space = new_space(0.7)
    losses = ablation_losses(space, new_evaluator(20))
    meeting = [
        numbers
        for count in range(len(space.free) + 1)
        for numbers in combinations(space.free, count)
        if space.meets(numbers)
    ]
    best = min(meeting, key=lambda numbers: sum(losses[number] for number in numbers))
    assert skipped_numbers(knapsack(space, new_evaluator(20), 0)) == sorted(best)


def test_the_ablation_order_begins_with_what_is_missed_least() -> None:
    space = new_space(0.7)
    losses = ablation_losses(space, new_evaluator(20))
    skipped = skipped_numbers(ablation_order(space, new_evaluator(20), 0))
    missed = [losses[number] for number in skipped]
    assert max(missed) < min(losses[number] for number in space.free if number not in skipped)


def test_random_routes_are_as_many_as_the_budget_and_the_best_is_taken() -> None:
    space, evaluator = new_space(), new_evaluator(9)
    more = best_random(space, evaluator, 5)
    assert evaluator.left == 0
    fewer = best_random(space, new_evaluator(2), 5)
    other = new_evaluator(2)
    assert other.loss(more) <= other.loss(fewer)
    assert len({tuple(skipped_numbers(best_random(space, new_evaluator(1), seed))) for seed in range(6)}) > 1


@pytest.mark.parametrize(("target", "expected"), [(0.85, [3]), (0.7, [2, 4]), (0.5, [1, 3, 4]), (0.3, [1, 2, 3, 4])])
def test_evenly_spaced_layers_take_no_pass(target: float, expected: list[int]) -> None:
    route = evenly_spaced(new_space(target), new_evaluator(0), 0)
    assert route.attention_skip == route.mlp_skip == expected


def test_the_span_is_the_best_of_all_runs() -> None:
    space, evaluator = new_space(), new_evaluator(20, bridged=True)
    route = best_span(space, evaluator, 0)
    others = span_routes(space.costs, space.target_cost, space.always, LAYERS)
    assert len(others) > 1
    assert evaluator.loss(route) == min(evaluator.loss(other) for other in others)


def test_layers_are_alike_by_the_cosine_of_the_streams_between_them() -> None:
    evaluator = new_evaluator(1)
    alike = cosines(evaluator)
    assert alike.shape == (LAYERS + 1, LAYERS + 1)
    assert_near(alike.diagonal(), torch.ones(LAYERS + 1))
    streams = all_streams(evaluator.model, [text for text, _ in evaluator.texts], read_residuals)
    expected = torch.cosine_similarity(streams[2], streams[6], dim=-1).mean()
    assert float(alike[1, 3]) == pytest.approx(float(expected), abs=1e-5)
    route = most_alike(new_space(), evaluator, 0)
    runs = span_routes(new_space().costs, 0.6, (0,), LAYERS)
    by_cosine = {run.mlp_skip[0]: float(alike[run.mlp_skip[0], run.mlp_skip[-1] + 1]) for run in runs}
    assert route.mlp_skip[0] == max(by_cosine, key=by_cosine.__getitem__)
    assert evaluator.spent == 1


def test_dimr_takes_the_trial_of_least_margin_cost() -> None:
    space = new_space()
    tried: list[Route] = []
    evaluator = new_evaluator(2 * BAYES_EVERY)
    loss = evaluator.loss
    evaluator.loss = lambda route, of: tried.append(route) or loss(route, of)  # type: ignore[method-assign, assignment]
    route = dimr(space, evaluator, 1)
    assert len(tried) == evaluator.spent == 2 * BAYES_EVERY
    again = new_evaluator(len(tried) + 1)
    costs = [again.loss(one, of=margin_cost) for one in tried]
    assert again.loss(route, of=margin_cost) == min(costs) < max(costs)


def test_dimr_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"install viasd_calib\[search\]"):
        dimr(new_space(), new_evaluator(3), 0)
