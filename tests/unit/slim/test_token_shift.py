"""States of token shifts: the same however a text is cut into passes, and exact wherever q has been."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.rounding import assert_near
from tests.tiny import TINY_FAMILIES, VOCAB, random_bridges, tiny_model
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.cache import CacheWindow, SharedCache, keep_rows, repeat_last, window_of_rows
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.bridges import token_shift_ends
from viasd_calib.slim.token_shift import linear_recurrence, repeated
from viasd_calib.spec import Route

ROUTE = Route(attention_skip=[1, 2], mlp_skip=[0, 2])
"""Two runs: the first MLP with the attention after it, and all of layer 2."""
LENGTH = 11


def routed(family: str = "llama") -> RoutedModel:
    return RoutedModel(tiny_model(0, family), ROUTE, {"bridges": random_bridges(ROUTE, carry=True)})


def ids_of(seed: int, rows: int = 1) -> Tensor:
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def over(cache: SharedCache, start: int, width: int) -> CacheWindow:
    return CacheWindow(cache, start, width, start + width)


def filled(model: RoutedModel, ids: Tensor, length: int) -> SharedCache:
    """A cache in which q has read the first ``length`` places."""
    cache = model.new_cache(LENGTH, batch=len(ids))
    if length:
        model.full(ids[:, :length], over(cache, 0, length))
    return cache


@torch.inference_mode()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_full_pass_keeps_the_stream_behind_each_run(family: str) -> None:
    model, ids = routed(family), ids_of(0, rows=2)
    assert model.token_shift_ends == [3, 6]
    cache = filled(model, ids, LENGTH)
    streams = read_residuals(model, ids, model.token_shift_ends)  # [2, length, runs, hidden]
    assert_near(cache.shift_states, streams.permute(2, 0, 1, 3))


@torch.inference_mode()
@given(st.integers(0, 99), st.integers(0, LENGTH - 1), st.sets(st.integers(1, LENGTH - 1)))
def test_however_slim_passes_are_cut_they_say_the_same(seed: int, begin: int, cuts: set[int]) -> None:
    model, ids = routed(), ids_of(seed)
    whole = filled(model, ids, begin)
    states = model.slim(ids[:, begin:], over(whole, begin, LENGTH - begin)).last
    cache = filled(model, ids, begin)
    edges = sorted({begin, LENGTH, *(cut for cut in cuts if cut > begin)})
    parts = [model.slim(ids[:, one:other], over(cache, one, other - one)).last for one, other in pairwise(edges)]
    assert_near(torch.cat(parts, 1), states)
    assert_near(cache.shift_states, whole.shift_states)


@torch.inference_mode()
@given(st.integers(0, 99), st.integers(0, LENGTH - 1))
def test_q_makes_exact_what_q_prime_left(seed: int, begin: int) -> None:
    model, ids = routed(), ids_of(seed)
    cache = filled(model, ids, begin)
    model.slim(ids[:, begin:], over(cache, begin, LENGTH - begin))
    exact = filled(model, ids, LENGTH).shift_states
    assert not torch.allclose(cache.shift_states, exact, atol=1e-3)
    model.full(ids[:, begin:], over(cache, begin, LENGTH - begin))
    assert_near(cache.shift_states, exact)


@torch.inference_mode()
@given(st.integers(0, 99), st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=4))
def test_rows_of_a_batch_are_as_each_text_alone(seed: int, spans: list[tuple[int, int]]) -> None:
    """Rows that begin anywhere and are of any width, while the first row of the cache does not take part."""
    model, ids = routed(), ids_of(seed, rows=1 + len(spans))
    cache = filled(model, ids, LENGTH)
    rows = cache.rows()[1:]
    starts, widths = [start for start, _ in spans], [width for _, width in spans]
    blocks = [ids[1 + row, start : start + width] for row, (start, width) in enumerate(spans)]
    untouched = cache.shift_states[:, 0].clone()
    states = model.slim(repeat_last(blocks), window_of_rows(rows, starts, widths)).last
    for row, (start, width) in enumerate(spans):
        alone = filled(model, ids[1 + row : 2 + row], LENGTH)
        expected = model.slim(blocks[row][None], over(alone, start, width)).last
        assert_near(states[row, :width], expected[0])
        assert_near(cache.shift_states[:, 1 + row], alone.shift_states[:, 0])
    assert torch.equal(cache.shift_states[:, 0], untouched)


@torch.inference_mode()
@given(st.integers(0, 99), st.integers(0, LENGTH - 1), st.integers(1, LENGTH))
def test_a_graph_of_another_width_carries_the_same(seed: int, begin: int, width: int) -> None:
    """Graphs pad a pass by its last token; here they run in Python."""
    width = min(width, LENGTH - begin)
    eager, ids = routed(), ids_of(seed)
    static = CompiledModel(eager.model, ROUTE, {"bridges": random_bridges(ROUTE, carry=True)}, compiler=lambda run: run)
    expected, found = eager.new_cache(LENGTH), static.new_cache(LENGTH)
    for model, cache in ((eager, expected), (static, found)):
        if begin:
            model.full(ids[:, :begin], over(cache, 0, begin))
    block = ids[:, begin : begin + width]
    states = eager.slim(block, over(expected, begin, width)).last
    assert_near(static.slim(block, over(found, begin, width)).last, states)
    assert_near(found.shift_states[:, :, :LENGTH], expected.shift_states)
    assert not found.shift_states[:, :, begin + width :].any()


def test_rows_keep_what_they_carry() -> None:
    model = routed()
    cache = filled(model, ids_of(0, rows=3), LENGTH)
    before = cache.shift_states.clone()
    first, _, third = cache.rows()
    keep_rows([third, first])
    assert torch.equal(cache.shift_states, before[:, [2, 0]])
    assert torch.equal(cache.only(1).shift_states, before[:, :1])


def test_only_bridges_with_a_carry_are_carried_for() -> None:
    mixed = nn.ModuleDict({**random_bridges(ROUTE, carry=True), "attention_2": random_bridges(ROUTE)["attention_2"]})
    assert token_shift_ends(ROUTE, mixed) == [3]
    assert token_shift_ends(ROUTE, nn.ModuleDict()) == []
    assert RoutedModel(tiny_model(), ROUTE).new_cache(4).shift_states.numel() == 0


@given(st.integers(1, 6), st.integers(0, 3))
def test_padding_does_not_move_on(width: int, padding: int) -> None:
    local, before = torch.randn(2, width, 3), torch.randn(2, 3)
    turn = torch.randn(3, 3)
    plain = linear_recurrence(local, before, lambda stream: stream @ turn)
    padded = torch.cat([local, local[:, -1:].expand(2, padding, 3)], 1)
    positions = torch.arange(width + padding).clamp(max=width - 1)[None]
    found = linear_recurrence(padded, before, lambda stream: stream @ turn, repeated(positions))
    assert torch.equal(found[:, :width], plain)
    assert torch.allclose(found[:, width:], plain[:, -1:].expand(2, padding, 3))
