"""Bits that are chosen: what rounding harms keeps sixteen."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import pytest
import torch

from tests.tiny import tiny_model
from viasd_calib.errors import SpecError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts import low_bit
from viasd_calib.slim.parts.base import FitInputs
from viasd_calib.slim.parts.low_bit import LowBit, LowBitOptions
from viasd_calib.spec import Route

IDS = torch.arange(1, 13)[None]
AUTO = LowBitOptions(bits="auto", options=(16, 8))


class Written:
    """A text."""

    ids = IDS[0]
    prompt_length = 1


def priced(shapes: Iterable[tuple[int, int]], tried: Sequence[int], *_: object) -> dict[object, float]:
    return {(shape, bits): shape[0] * shape[1] * bits for shape in shapes for bits in {16, *tried}}


@torch.no_grad()
def divergence(model: RoutedModel, _: int) -> float:
    """Mean KL(q || q') where each reads what it wrote itself."""
    size = IDS.shape[1]
    passes = [CacheWindow(model.new_cache(size), 0, size, size) for _ in range(2)]
    full = model.logits(model.full(IDS, passes[0]).last).log_softmax(-1)
    slim = model.slim_logits(model.slim(IDS, passes[1]).last).log_softmax(-1)
    return float((full.exp() * (full - slim)).sum(-1).mean())


def inputs(target_cost: float, route: Route) -> FitInputs:
    """Of a verifier where the MLP of layer 1 has a neuron that never fires, and weights far out that read it."""
    model = copy.deepcopy(tiny_model())
    mlp = model.get_decoder().layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[0] = 0
        mlp.down_proj.weight[:, 0] = 1000
    texts = [Written()]
    return FitInputs(RoutedModel(model), route, texts, None, divergence, target_cost)  # type: ignore[arg-type]


def test_a_sublayer_with_outliers_keeps_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    held = LowBit().fit(inputs(0.7, Route(attention_skip=[2])), AUTO)
    assert isinstance(held, low_bit.ChosenBits)
    rows = held.table.measured
    worst = max(rows, key=lambda row: row.kl)
    assert (worst.kind, worst.layer, worst.bits) == ("mlp", 1, 8)
    assert 1 not in held.bits("mlp")
    assert held.bits("mlp")
    assert ("attention", 2) not in {(row.kind, row.layer) for row in rows}


def test_where_the_target_is_met_without_low_bits_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    with pytest.raises(SpecError, match="bits auto leaves everything in 16 bits, which meets target_cost; lower it"):
        LowBit().fit(inputs(1.0, Route()), AUTO)
