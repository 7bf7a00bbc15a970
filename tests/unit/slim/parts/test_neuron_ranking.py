"""Ranking neurons: by what they add where q wrote, whatever order they are in."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tiny import TINY_FAMILIES, tiny_model, tiny_texts
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.base import FitInputs
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, MlpKeep, MlpKeepOptions, narrow_layers, rank_neurons
from viasd_calib.spec import Route
from viasd_calib.training.spans import route_divergences


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_neurons_are_ranked_by_what_they_add(family: str) -> None:
    """Against the definition, on what enters the first MLP of each family."""
    model, texts = RoutedModel(tiny_model(0, family)), tiny_texts(3)
    mlp = model.layers[0].mlp
    entered = []
    for text in texts:
        ids = text.ids[None, :-1]
        hidden = model.embed(ids)
        window = CacheWindow(model.new_cache(ids.shape[1]), 0, ids.shape[1], ids.shape[1])
        inputs = model.attention_inputs(hidden, window.positions(), window.mask, window)
        hidden = hidden + model.step(model.full_sublayers[0], hidden, inputs)
        layer = model.layers[0]
        norm = layer.pre_feedforward_layernorm if "gemma" in family else layer.post_attention_layernorm
        state = norm(hidden)[0, text.prompt_length - 1 :]
        if family.startswith("phi3"):
            gate, up = mlp.gate_up_proj(state).chunk(2, -1)
            entered.append(mlp.activation_fn(gate) * up)
        else:
            entered.append(mlp.act_fn(mlp.gate_proj(state)) * mlp.up_proj(state))
    score = torch.cat(entered).abs().mean(0) * mlp.down_proj.weight.norm(dim=0)
    ranked = rank_neurons(model, [0], texts, read_residuals)[0]
    assert sorted(ranked.tolist()) == list(range(32))
    assert (score[ranked].diff() <= 1e-5).all()
    assert score[ranked[0]] > 2 * score[ranked[-1]]
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_the_ranking_does_not_depend_on_the_order_they_are_in() -> None:
    texts = tiny_texts(3)
    expected = rank_neurons(RoutedModel(tiny_model()), [1, 2], texts, read_residuals)
    model = copy.deepcopy(tiny_model())
    narrow_layers(model.get_decoder().layers, {1: KeptNeurons(torch.arange(32).flip(0), 9)})
    found = rank_neurons(RoutedModel(model), [1, 2], texts, read_residuals)
    assert {layer: order.tolist() for layer, order in found.items()} == {
        layer: order.tolist() for layer, order in expected.items()
    }


def test_the_first_ones_leave_less_divergence_than_the_last_ones() -> None:
    texts = tiny_texts(12)
    inputs = FitInputs(RoutedModel(tiny_model()), Route(), texts[:8], read_residuals)
    fitted = MlpKeep().fit(inputs, MlpKeepOptions(layers=(1, 2), keep=20))
    divergence = []
    for widths in (fitted, {layer: KeptNeurons(kept.order.flip(0), 20) for layer, kept in fitted.items()}):
        model = copy.deepcopy(tiny_model())
        routed = RoutedModel(model, held={"mlp_keep": narrow_layers(model.get_decoder().layers, widths)})
        divergence += route_divergences(routed, [routed.slim_sublayers], texts[8:])
    best, worst = divergence
    assert best < 0.8 * worst
