"""Bridges in closed form: they recover a linear run, and a low rank keeps what matters most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.rounding import assert_near
from tests.tiny import tiny_model, tiny_texts
from viasd_calib.replay.teacher import read_residuals, read_text
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.slim.least_squares import LeastSquares
from viasd_calib.slim.parts.base import FitInputs, generated_residuals
from viasd_calib.slim.parts.bridges import Bridge, BridgeOptions, Bridges, fit_bridges, set_least_squares
from viasd_calib.spec import Route
from viasd_calib.training.spans import route_divergences

ROUTE = Route(attention_skip=[1, 2], mlp_skip=[1, 2])


def problem(weight: Tensor, bias: Tensor) -> LeastSquares:
    inputs = torch.randn(400, weight.shape[1], generator=torch.Generator().manual_seed(0))
    found = LeastSquares(weight.shape[1] + 1, weight.shape[0])
    found.add(torch.cat([inputs, torch.ones(400, 1)], 1), inputs @ weight.T + bias)
    return found


def test_a_linear_run_is_recovered() -> None:
    weight, bias = torch.randn(6, 6), torch.randn(6)
    bridge = Bridge(6)
    set_least_squares(bridge, problem(weight, bias), None)
    inputs = torch.randn(5, 6)
    assert torch.allclose(bridge(inputs), inputs @ weight.T + bias, atol=0.05)


@torch.no_grad()
def test_a_low_rank_recovers_a_map_of_that_rank_and_loses_what_is_beyond() -> None:
    weight = torch.randn(6, 2) @ torch.randn(2, 6)
    inputs = torch.randn(50, 6)
    errors = []
    for rank in (1, 2):
        bridge = Bridge(6, rank)
        set_least_squares(bridge, problem(weight, torch.zeros(6)), rank)
        errors.append(float((bridge(inputs) - inputs @ weight.T).norm() / (inputs @ weight.T).norm()))
    assert errors[1] < 0.05 < errors[0]


def test_residuals_are_the_stream_before_each_sublayer() -> None:
    model = RoutedModel(tiny_model())
    ids = torch.randint(24, (2, 7))
    read = read_residuals(model, ids, [0, 2, 3, 8])
    states, _ = read_text(model, ids, (0, 1))
    assert torch.equal(read[:, :, :2], states.tapped)
    assert_near(model.final_norm(read[:, :, 3]), states.last)
    assert not torch.allclose(read[:, :, 1], read[:, :, 2])


def test_a_token_shift_is_recovered() -> None:
    weight, carry, bias = torch.randn(6, 6), torch.randn(6, 6), torch.randn(6)
    inputs, before = torch.randn(400, 6), torch.randn(400, 6)
    found = LeastSquares(13, 6)
    found.add(torch.cat([inputs, before, torch.ones(400, 1)], 1), inputs @ weight.T + before @ carry.T + bias)
    bridge = Bridge(6, carry=True)
    set_least_squares(bridge, found, None)
    assert torch.allclose(bridge(inputs), inputs @ weight.T + bias, atol=0.1)
    assert torch.allclose(bridge.token_shift(before), before @ carry.T, atol=0.1)


@torch.no_grad()
def test_a_bridge_with_a_token_shift_fits_its_examples_better() -> None:
    model, texts = RoutedModel(tiny_model()), tiny_texts(12)
    errors = []
    for carry in (False, True):
        (bridges,) = fit_bridges(model, [ROUTE], texts, read_residuals, BridgeOptions(carry=carry))
        bridge = bridges["attention_1"]
        assert isinstance(bridge, Bridge)
        error = 0.0
        for text in texts:
            stream = generated_residuals(model, text, [2, 6], read_residuals, lead=1)  # [1 + n, 2, hidden]
            made = stream[1:, 0] + bridge(stream[1:, 0])
            made = made + bridge.token_shift(stream[:-1, 1]) if carry else made
            error += float((made - stream[1:, 1]).square().sum())
        errors.append(error)
    plain, shifted = errors
    assert shifted < 0.95 * plain


def test_places_before_the_text_are_nothing() -> None:
    model, (text, *_) = RoutedModel(tiny_model()), tiny_texts(1)
    lead = text.prompt_length + 1
    stream = generated_residuals(model, text, [0, 3], read_residuals, lead=lead)
    assert not stream[:2].any()
    assert torch.equal(stream[2:], read_residuals(model, text.ids[None, :-1], [0, 3])[0])
    assert torch.equal(stream[lead:], generated_residuals(model, text, [0, 3], read_residuals))


@pytest.mark.parametrize("rank", [None, 8])
def test_bridges_leave_less_divergence_than_nothing(rank: int | None) -> None:
    model = RoutedModel(tiny_model())
    seen, unseen = tiny_texts(60)[:50], tiny_texts(60)[50:]
    (bridges,) = fit_bridges(model, [ROUTE], seen, read_residuals, BridgeOptions(rank=rank))
    kept = [sublayers_of(model.layers, model.layer_types, ROUTE, one) for one in (bridges, None)]
    bridged, bare = route_divergences(model, kept, unseen)
    assert bridged < 0.8 * bare


def test_several_routes_are_fitted_as_each_alone() -> None:
    model, seen = RoutedModel(tiny_model()), tiny_texts(6)
    other = Route(mlp_skip=[2])
    together = fit_bridges(model, [ROUTE, other], seen, read_residuals)
    for route, found in zip((ROUTE, other), together, strict=True):
        alone = Bridges().fit(FitInputs(model, route, seen, read_residuals), BridgeOptions())
        assert found.keys() == alone.keys()
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), alone.parameters(), strict=True))
