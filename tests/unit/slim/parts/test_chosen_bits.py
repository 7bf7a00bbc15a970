"""Bits that are chosen: what rounding harms keeps sixteen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.tiny.bits import priced
from viasd_calib.errors import JobWarning, SpecError
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


def test_where_the_target_is_met_without_low_bits_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    words = r"bits auto leaves everything in 16 bits, whose products take 1\.00 .* meet target_cost 1: the route has no"
    with pytest.warns(JobWarning, match=words):
        assert LowBit().fit(inputs(1.0, Route()), AUTO) is None


def test_a_target_that_no_choice_meets_is_refused_before_minutes_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    given = replace(inputs(0.4, Route()), divergence=lambda *_: pytest.fail("measured"))
    with pytest.raises(SpecError, match=r"no choice of bits brings the cost .* the least is 0\.500"):
        LowBit().fit(given, AUTO)


def test_divergences_are_measured_on_texts_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on the same ones each time, or a fit that goes on would choose by others."""
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    seen: list[list[int]] = []
    for _ in range(2):
        asked: set[int] = set()
        given = inputs(0.7, Route())

        def noted(model: RoutedModel, number: int, asked: set[int] = asked) -> float:
            asked.add(number)
            return divergence(model, number)

        LowBit().fit(replace(given, texts=[Written()] * 100, divergence=noted), AUTO)  # type: ignore[list-item]
        seen.append(sorted(asked))
    assert seen[0] == seen[1]
    assert len(seen[0]) == low_bit.TEXTS
    assert seen[0][-1] >= 50
    assert max(after - before for before, after in itertools.pairwise(seen[0])) < 50


def test_bits_that_were_chosen_for_the_same_are_taken_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prices: list[int] = []

    def dearer_each_time(shapes: Iterable[tuple[int, int]], tried: Sequence[int], *_: object) -> dict[object, float]:
        """Of another machine, or of the same one a minute later: what is kept would cost less."""
        prices.append(len(prices))
        return {key: seconds + 500 * prices[-1] for key, seconds in priced(shapes, tried).items()}

    monkeypatch.setattr(low_bit, "product_seconds", dearer_each_time)
    given = replace(inputs(0.8, Route()), folder=tmp_path)
    first = LowBit().fit(given, AUTO)
    with pytest.warns(JobWarning, match=r"bits are those of .*low_bit\.json; remove it to choose anew"):
        again = LowBit().fit(given, AUTO)
    assert again == first
    assert isinstance(again, low_bit.ChosenBits)
    assert again.table.measured
    assert prices == [0]
    changes: list[tuple[Any, LowBitOptions]] = [
        (replace(given, target_cost=0.9), AUTO),
        (replace(given, route=Route(mlp_skip=[1])), AUTO),
        (given, LowBitOptions(bits="auto", options=(16, 4))),
    ]
    for others, options in changes:
        LowBit().fit(others, options)
    assert prices == [0, 1, 2, 3]
    (tmp_path / low_bit.MEASURED_FILE).write_text("{", encoding="utf-8")
    LowBit().fit(given, AUTO)
    assert prices == [0, 1, 2, 3, 4]
