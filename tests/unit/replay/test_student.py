"""The parallel student pass against the decoder's own slim passes, run by run."""

from __future__ import annotations

import pytest
import torch

from tests.rounding import assert_near
from tests.tiny import TINY_FAMILIES, random_bridges, tiny_model
from viasd_calib.replay.student import run_starts, student_states
from viasd_calib.replay.teacher import TappedStates, read_text
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Route


@torch.no_grad()
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("max_run", [1, 3, 20])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_one_forward_sees_what_the_decoder_sees(family: str, max_run: int, carry: bool) -> None:
    """For every run: q has filled the cache up to it, then q' goes through it on its own."""
    route = Route(attention_skip=[1], mlp_skip=[2])
    bridges = random_bridges(route, carry=carry)
    model = RoutedModel(tiny_model(0, family), route, {"bridges": bridges})
    ids = torch.randint(24, (1, 17))
    starts = run_starts(17, max_run, torch.Generator().manual_seed(max_run))
    _, teacher = read_text(model, ids)
    parallel = student_states(model, model.slim_sublayers, ids, teacher, starts)
    for start in starts.unique().tolist():
        width = int((starts == start).sum())
        cache = model.new_cache(17)
        if start:
            model.full(ids[:, :start], CacheWindow(cache, 0, start, start))
        block = ids[:, start : start + width]
        states = model.slim(block, CacheWindow(cache, start, width, start + width)).last
        assert_near(states, parallel[:, start : start + width])


def test_open_gates_change_nothing_and_closed_ones_skip() -> None:
    model = RoutedModel(tiny_model())
    ids = torch.randint(24, (2, 9))
    _, teacher = read_text(model, ids)
    starts = torch.arange(9)
    count = len(model.full_sublayers)
    plain = student_states(model, model.full_sublayers, ids, teacher, starts)
    assert_near(student_states(model, model.full_sublayers, ids, teacher, starts, torch.ones(count)), plain)
    gates = torch.ones(count)
    gates[2] = 0  # the attention of layer 1
    skipped = RoutedModel(tiny_model(), Route(attention_skip=[1])).slim_sublayers
    assert_near(
        student_states(model, model.full_sublayers, ids, teacher, starts, gates),
        student_states(model, skipped, ids, teacher, starts),
    )


def test_tapped_states_are_those_of_the_text_whatever_the_padding() -> None:
    model = RoutedModel(tiny_model())
    ids = torch.randint(24, (1, 8))
    kept = TappedStates(model, (1, 4))
    first = kept.of([0], ids)
    padded = kept.of([0], torch.nn.functional.pad(ids, (0, 3)))
    assert padded.shape[1] == 11
    assert torch.equal(padded[:, :8], first)
    assert torch.allclose(first, read_text(model, ids, (1, 4))[0].tapped, rtol=0.01)  # kept in bfloat16
