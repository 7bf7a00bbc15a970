"""A part that exchanges linear layers: after all others, charged by its own time, and left alone by backends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.rounding import assert_near
from tests.tiny import tiny_model
from tests.toy_low_bit import ByteLinear, LowBitEntry
from tests.toy_part import MeanUpdateEntry
from tests.unit.slim.test_compiled import TEXT, Traced, over, row
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.cost import sublayer_costs
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.onednn_linear import can_pack
from viasd_calib.slim.parts.base import parts_of
from viasd_calib.slim.parts.mlp_keep import KeptNeurons
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import Route, TensorFile

NARROW = {1: KeptNeurons(torch.arange(32).flip(0), 8)}
HELD = {"low_bit": (2, 3, 5, 8), "mlp_keep": NARROW, "head_vocab": torch.arange(5)}
"""The attention of layer 1, two MLPs, one of them narrow, and a reduced head."""


def linears(sublayer: Sublayer) -> set[type[nn.Module]]:
    """The kinds of the linear layers that a sublayer runs."""
    module: Any = sublayer.layer.self_attn if sublayer.kind == "attention" else sublayer.layer.mlp
    return {type(child) for name, child in module.named_children() if name.endswith("_proj")}


def test_a_part_that_comes_last_is_behind_those_named_after_it() -> None:
    tensors = TensorFile(path="some/tensors.safetensors", sha256="0" * 64)
    entries = {"low_bit": LowBitEntry(sublayers=(1,)), "mean_update": MeanUpdateEntry(scale=1.0, tensors=tensors)}
    assert [part.name for part in parts_of(Route.model_validate(entries))] == ["skips", "mean_update", "low_bit"]


@torch.no_grad()
def test_it_exchanges_what_other_parts_made_and_leaves_the_full_verifier_alone() -> None:
    routed = RoutedModel(copy.deepcopy(tiny_model()), held=HELD)
    exchanged = [number for number, one in enumerate(routed.slim_sublayers) if linears(one) == {ByteLinear}]
    assert exchanged == [2, 3, 5]
    assert routed.slim_layers[1].mlp.down_proj.weight.shape == (16, 8)  # type: ignore[union-attr]
    assert {kind for one in routed.full_sublayers for kind in linears(one)} == {nn.Linear}
    hidden = torch.randn(3, routed.config.hidden_size)
    whole, rounded = routed.logits(hidden)[:, :5], routed.slim_logits(hidden)[:, :5]
    assert not torch.equal(whole, rounded)
    torch.testing.assert_close(rounded, whole, atol=0.05, rtol=0.05)


class LinearClock(RoutedModel):
    """A verifier whose MLPs alone take time: a second for each neuron, half of it for 8 bits."""

    now = 0.0

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def step(self, sublayer: Sublayer, hidden: Tensor, inputs: Any) -> Tensor:
        if sublayer.kind == "mlp":
            mlp: Any = sublayer.layer.mlp
            self.now += mlp.down_proj.weight.shape[1] * (0.5 if linears(sublayer) == {ByteLinear} else 1)
        return super().step(sublayer, hidden, inputs)


def test_each_sublayer_is_charged_with_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LinearClock(copy.deepcopy(tiny_model()), held=HELD)
    monkeypatch.setattr("viasd_calib.slim.cost.time", clock)
    assert sublayer_costs(clock, repeats=2).shares.tolist() == [0, 0.25, 0, 0.03125, 0, 0.125, 0, 0.25]


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
@torch.inference_mode()
def test_backends_leave_it_alone() -> None:
    eager = RoutedModel(copy.deepcopy(tiny_model()), held=HELD)
    compiled = CompiledModel(copy.deepcopy(tiny_model()), held=HELD, compiler=Traced())
    prepare((compiled.model, *compiled.slim_networks), "packed", compiled.device, compiled.dtype)
    kinds = [linears(one) for one in compiled.slim_sublayers]
    assert [ByteLinear in one for one in kinds] == [False, False, True, True, False, True, False, False]
    assert all(nn.Linear not in one for one in kinds)
    ours, theirs = (
        model.slim_logits(model.slim(row(TEXT), over(model.new_cache(len(TEXT)), 0, len(TEXT))).last)[..., :5]
        for model in (compiled, eager)
    )
    assert_near(ours, theirs)
