"""Compiled passes say what eager ones say, write the same keys and values, and stay few."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tiny import LAYERS, TINY_FAMILIES, VOCAB, longrope_config, make_model, tiny_config, tiny_model
from viasd_calib.errors import ModelError, PromptError
from viasd_calib.slim.adapter import adapted_layers
from viasd_calib.slim.backends import open_model, prepare
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.compiled import WIDTHS, CompiledModel, StaticPass, static_capacity, static_width
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.slim.grouped import GROUPED
from viasd_calib.spec import Route

ROUTE = Route(attention_skip=[1], mlp_skip=[2])
TEXT = [5, 1, 17, 3, 3, 9, 20, 11, 8, 2, 14, 6]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def as_it_is(run: StaticPass) -> StaticPass:
    """Static shapes, and nothing compiled."""
    return run


class Traced:
    """Whole graphs that PyTorch runs operation by operation: as strict as compiling them, and fast.

    Attributes:
        counter: how many graphs there are; a graph that is compiled anew counts again.
    """

    def __init__(self) -> None:
        self.counter = CompileCounterWithBackend("eager")

    def __call__(self, run: StaticPass) -> StaticPass:
        return torch.compile(run, fullgraph=True, dynamic=False, backend=self.counter)  # type: ignore[call-overload,no-any-return]


def row(ids: Sequence[int]) -> Tensor:
    return torch.tensor([ids])


def over(cache: SharedCache, start: int, width: int) -> CacheWindow:
    return CacheWindow(cache, start, width, start + width)


def assert_alike(compiled: RoutedModel, eager: RoutedModel, taps: Sequence[int] = ()) -> None:
    """The passes of a text, of all kinds: a prompt, blocks by q' and q over them, and single tokens."""
    caches = compiled.new_cache(len(TEXT)), eager.new_cache(len(TEXT))
    steps = [("full", 0, 3), ("slim", 3, 5), ("slim", 8, 1), ("full", 3, 8), ("full", 11, 1)]
    for tier, start, width in steps:
        ids = row(TEXT[start : start + width])
        said, expected = (
            getattr(model, tier)(ids, over(cache, start, width), taps)
            for model, cache in zip((compiled, eager), caches, strict=True)
        )
        assert said.last.shape == expected.last.shape
        torch.testing.assert_close(compiled.logits(said.last), eager.logits(expected.last), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(said.tapped, expected.tapped, atol=1e-5, rtol=1e-5)
        for ours, theirs in ((caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
            torch.testing.assert_close(ours[..., : len(TEXT), :], theirs, atol=1e-5, rtol=1e-5)
            assert not ours[..., start + width :, :].any()


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.inference_mode()
def test_every_family_says_the_same(family: str) -> None:
    """q and q', logits, taps, and every key and value, as whole graphs: nothing in them waits for the device."""
    compiled = CompiledModel(tiny_model(0, family), ROUTE, compiler=Traced())
    compiled.expect_taps((1, 3))
    assert_alike(compiled, RoutedModel(tiny_model(0, family), ROUTE), (1, 3))


@torch.inference_mode()
def test_slim_layers_with_an_adapter_say_the_same() -> None:
    model = copy.deepcopy(tiny_model())
    slim = adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj", "up_proj"])
    for name, tensor in slim.state_dict().items():
        if "lora_B" in name:
            nn.init.normal_(tensor)
    eager = RoutedModel(copy.deepcopy(model), ROUTE, slim)
    compiled = open_model(model, ROUTE, slim, "compiled")
    assert isinstance(compiled, CompiledModel)
    compiled._compiler = Traced()
    prepare([model, slim], "compiled", compiled.device, compiled.dtype)
    assert {layer.self_attn.config._attn_implementation for layer in [*compiled.layers, *slim]} == {GROUPED}
    assert_alike(compiled, eager)


@torch.inference_mode()
def test_a_rotary_embedding_that_depends_on_the_text_says_the_same() -> None:
    model = make_model(longrope_config(context=6))
    assert_alike(CompiledModel(model, ROUTE, compiler=Traced()), RoutedModel(copy.deepcopy(model), ROUTE))
