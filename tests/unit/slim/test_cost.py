from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.clocks import MlpClock
from tests.tiny import tiny_model
from viasd_calib.slim.cost import WARM_UP, interleaved_seconds, median_seconds, relative_cost, sublayer_costs
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, NarrowMLP, narrow_layers
from viasd_calib.slim.plan import Sublayer

CPU = torch.device("cpu")


def test_functions_take_turns_in_an_order_drawn_anew() -> None:
    calls: list[str] = []
    runs = [lambda name=name: calls.append(name) for name in "abcd"]
    seconds = interleaved_seconds(runs, 5, CPU)
    rounds = ["".join(calls[place : place + 4]) for place in range(0, len(calls), 4)]
    assert len(rounds) == WARM_UP + 5
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 1
    assert [len(taken) for taken in seconds] == [5] * 4  # the warm-up is not among them


def test_times_belong_to_their_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that the functions themselves move."""
    clock = [0.0]
    monkeypatch.setattr("viasd_calib.slim.cost.time.perf_counter", lambda: clock[0])

    def move(by: float) -> None:
        clock[0] += by

    runs = [lambda: move(1.0), lambda: move(8.0), lambda: move(2.0)]
    assert interleaved_seconds(runs, 3, CPU, after_each=lambda: move(64.0)) == [[1.0] * 3, [8.0] * 3, [2.0] * 3]
    assert median_seconds(runs, 3, CPU) == [1.0, 8.0, 2.0]


class HeadClock(RoutedModel):
    """A verifier whose output heads alone take time: q's 8 s, that of q' 2 s."""

    now = 0.0

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def logits(self, hidden: Tensor) -> Tensor:
        self.now += 8.0
        return super().logits(hidden)

    def slim_logits(self, hidden: Tensor) -> Tensor:
        self.now += 2.0
        return super().slim_logits(hidden)


def test_a_slim_pass_is_charged_with_its_own_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HeadClock(tiny_model(), held={"head_vocab": torch.arange(6)})
    monkeypatch.setattr("viasd_calib.slim.cost.time", model)
    assert relative_cost(model, widths=(1, 2), repeats=2) == {1: 0.25, 2: 0.25}
    costs = sublayer_costs(model, repeats=2)
    assert costs.rest == 0.25
    assert costs.shares.tolist() == [0.0] * len(model.full_sublayers)


class NeuronClock(MlpClock):
    """A verifier whose MLPs alone take time: a second for each neuron."""

    def seconds_of(self, sublayer: Sublayer) -> float:
        mlp: Any = sublayer.layer.mlp
        return mlp.keep if isinstance(mlp, NarrowMLP) else 32


def test_a_narrow_mlp_is_charged_with_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle layer, which stands for others, is whole here; and each width is timed."""
    model = copy.deepcopy(tiny_model())
    order = torch.arange(32)
    layers = narrow_layers(model.get_decoder().layers, {1: KeptNeurons(order, 8), 3: KeptNeurons(order, 16)})
    clock = NeuronClock(model, held={"mlp_keep": layers})
    monkeypatch.setattr("viasd_calib.slim.cost.time", clock)
    costs = sublayer_costs(clock, repeats=2)
    assert costs.shares.tolist() == [0, 0.25, 0, 0.0625, 0, 0.25, 0, 0.125]
    assert costs.rest == 0.0
    assert relative_cost(clock, widths=(1,), repeats=2) == {1: 88 / 128}
