"""Which runs of layers are tried, and which is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import LAYERS, tiny_model, tiny_texts
from viasd_calib.errors import CalibrationError
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.slim.parts.bridges import fit_bridges
from viasd_calib.spec import Route
from viasd_calib.training.spans import choose_span, route_divergences, span_routes


def even(layers: int) -> SublayerCosts:
    return SublayerCosts(torch.full((2 * layers,), 0.9 / (2 * layers)), 0.1)


@given(st.integers(2, 12), st.floats(0.2, 0.95), st.sets(st.integers(0, 11)))
def test_spans_meet_the_target_and_not_more_than_they_must(layers: int, target: float, always: set[int]) -> None:
    costs, stay = even(layers), sorted(layer for layer in always if layer < layers)
    try:
        routes = span_routes(costs, target, stay, layers)
    except CalibrationError:
        return
    share = 0.9 / layers
    for route in routes:
        skipped = route.mlp_skip
        assert skipped == route.attention_skip == list(range(skipped[0], skipped[-1] + 1))
        assert not set(skipped) & set(stay)
        assert 1 - share * len(skipped) <= target + 1e-5 < 1 - share * (len(skipped) - 1) + 2e-5
    assert len({route.mlp_skip[0] for route in routes}) == len(routes)


def test_what_narrow_mlps_and_a_reduced_head_save_counts() -> None:
    """Costs that sum to 0.8, a layer's are 0.175."""
    costs = SublayerCosts(torch.full((8,), 0.7 / 8), 0.1)
    assert [route.mlp_skip for route in span_routes(costs, 0.6, [0], 4)] == [[1, 2], [2, 3]]
    assert [route.mlp_skip for route in span_routes(costs, 0.63, [0], 4)] == [[1], [2], [3]]
    assert span_routes(costs, 0.8, [0], 4) == [Route()]


def test_a_target_beyond_reach_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"down to 0\.4 of a full one; raise target_cost"):
        span_routes(even(4), 0.4, [0, 2], 4)


def test_the_span_with_the_least_divergence_is_taken() -> None:
    model = RoutedModel(tiny_model())
    seen, unseen = tiny_texts(30)[:24], tiny_texts(30)[24:]
    routes = span_routes(even(LAYERS), 0.8, [], LAYERS)
    assert len(routes) == LAYERS
    route, bridges = choose_span(model, routes, seen, unseen)
    kept = [
        sublayers_of(model.layers, model.layer_types, tried, fitted)
        for tried, fitted in zip(routes, fit_bridges(model, routes, seen, read_residuals), strict=True)
    ]
    divergence = {
        tried.mlp_skip[0]: kl for tried, kl in zip(routes, route_divergences(model, kept, unseen), strict=True)
    }
    assert route.mlp_skip[0] == min(divergence, key=divergence.__getitem__)
    assert [*bridges] == [f"attention_{route.mlp_skip[0]}"]
