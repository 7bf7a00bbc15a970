"""Compiled passes say what eager ones say, write the same keys and values, and stay few."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from tests.cases import METHODS, Case, cases, lively_case
from tests.rounding import assert_near
from tests.tiny import TINY_FAMILIES, VOCAB, make_drafter, make_model, tiny_config, tiny_model
from tests.unit.test_progress import Noted
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.errors import ModelError, PromptError
from viasd_calib.progress import reporting
from viasd_calib.slim.backends import open_model, prepare
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.compiled import WIDTHS, CompiledModel, StaticPass, static_capacity
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.slim.grouped_query_attention import GROUPED
from viasd_calib.slim.onednn_linear import OneDNNLinear, can_pack, pack_linears
from viasd_calib.slim.parts.adapter import adapted_layers
from viasd_calib.spec import Route

ROUTE = Route(attention_skip=[1], mlp_skip=[2])
TEXT = [5, 1, 17, 3, 3, 9, 20, 11, 8, 2, 14, 6]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def in_python(
    model: PreTrainedModel, route: Route | None = None, held: Mapping[str, object] | None = None
) -> CompiledModel:
    """A compiled model whose passes are static, and run as Python."""
    return CompiledModel(model, route, held, compiler=lambda run: run)


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
        ids = row(TEXT[start : start + width]).to(compiled.device)
        said, expected = (
            getattr(model, tier)(ids, over(cache, start, width), taps)
            for model, cache in zip((compiled, eager), caches, strict=True)
        )
        assert said.last.shape == expected.last.shape
        assert_near(compiled.logits(said.last), eager.logits(expected.last))
        assert_near(said.tapped, expected.tapped)
        for ours, theirs in ((caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
            assert_near(ours[..., : len(TEXT), :], theirs)
            assert not ours[..., start + width :, :].any()


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.inference_mode()
def test_every_family_says_the_same(family: str) -> None:
    """q and q', logits, taps, and every key and value, as whole graphs: nothing in them waits for the device."""
    model = tiny_model(0, family, layers=3)  # tracing takes its time with each
    compiled = CompiledModel(model, ROUTE, compiler=Traced())
    compiled.expect_taps((1, 3))
    assert_alike(compiled, RoutedModel(model, ROUTE), (1, 3))


@torch.inference_mode()
def test_slim_layers_with_an_adapter_say_the_same() -> None:
    model = copy.deepcopy(tiny_model())
    slim = adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj", "up_proj"])
    for name, tensor in slim.state_dict().items():
        if "lora_B" in name:
            nn.init.normal_(tensor)
    eager = RoutedModel(copy.deepcopy(model), ROUTE, {"adapter": slim})
    compiled = open_model(model, ROUTE, {"adapter": slim}, "compiled")
    assert isinstance(compiled, CompiledModel)
    compiled._compiler = Traced()
    prepare([model, slim], "compiled", compiled.device, compiled.dtype)
    assert {layer.self_attn.config._attn_implementation for layer in [*compiled.layers, *slim]} == {GROUPED}
    assert_alike(compiled, eager)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])  # plain, with biases, with caps, fused
@torch.inference_mode()
def test_packed_weights_are_found_from_graphs(family: str) -> None:
    """Graphs name packed layers, joint ones too, and hold none: layers are gone with their model."""
    model = copy.deepcopy(tiny_model(0, family, layers=3))
    pack_linears([model])
    packed = [weakref.ref(module) for module in model.modules() if isinstance(module, OneDNNLinear)]
    compiled = CompiledModel(model, ROUTE, compiler=Traced())
    assert_alike(compiled, RoutedModel(tiny_model(0, family, layers=3), ROUTE))
    assert packed
    del compiled, model
    torch._dynamo.reset()
    gc.collect()
    assert not any(layer() for layer in packed)


@pytest.mark.parametrize(("dtype", "packs"), [(torch.float32, False), (torch.bfloat16, True)])
def test_weights_are_packed_for_graphs_where_that_is_faster(dtype: torch.dtype, packs: bool) -> None:
    if not can_pack(torch.device("cpu"), dtype):
        pytest.skip(f"this CPU does not calculate in {dtype}")
    model = copy.deepcopy(tiny_model()).to(dtype)
    prepare([model], "compiled", model.device, dtype)
    assert any(isinstance(module, OneDNNLinear) for module in model.modules()) is packs


def test_what_waits_in_the_middle_of_a_pass_is_refused() -> None:
    """This embedding asks how long the text is before it goes on, which a graph cannot."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model = CompiledModel(make_model(tiny_config(rope_parameters=rope)), compiler=Traced())
    with pytest.raises(ModelError, match=r"backend compiled cannot compile this model on cpu .*choose backend eager"):
        model.full(row([3, 4]), over(model.new_cache(4), 0, 2))
    assert not model._graphs


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_named(tmp_path: Path) -> None:
    program = (
        "from tests.tiny import tiny_model\n"
        "from viasd_calib.slim.compiled import CompiledModel\n"
        "CompiledModel(tiny_model(layers=1)).prepare_passes([8], 1)"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "ModelError: backend compiled cannot compile this model on cpu (" in ran.stderr
    assert "needs a C++ compiler, and Triton on CUDA: install them, or choose backend eager" in ran.stderr


@given(width=st.integers(1, WIDTHS[-1]), more=st.integers(0, 9), seed=st.integers(0, 3), slim=st.booleans())
@torch.inference_mode()
def test_padding_changes_nothing(width: int, more: int, seed: int, slim: bool) -> None:
    """Any width at any place, beside the eager pass."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCAB, (1, more + width), generator=draw)
    compiled, eager = (kind(tiny_model(seed), ROUTE) for kind in (in_python, RoutedModel))
    caches = [model.new_cache(text.shape[1]) for model in (compiled, eager)]
    said = []
    for model, cache in zip((compiled, eager), caches, strict=True):
        if more:
            model.full(text[:, :more], over(cache, 0, more))
        said.append((model.slim if slim else model.full)(text[:, more:], over(cache, more, width)).last)
    assert_near(*said)
    assert_near(caches[0].values[..., : text.shape[1], :], caches[1].values)


@settings(max_examples=12)
@given(case=cases(), name=st.sampled_from(METHODS))
def test_decoding_is_token_identical(case: Case, name: str) -> None:
    """Same tokens, tiers and passes as eager."""
    said = []
    for verifier in (in_python(case.model, case.route, case.slim_parts), case.verifier):
        drafter = make_drafter(case.drafter_kind, verifier, case.seed, case.family)
        verifier.expect_taps(drafter.taps)
        decoder = Decoder(verifier, drafter, case.named(name), case.eos)
        said += [decoder.generate(case.prompt, case.count), *decoder.generate_batch([case.prompt, [1, 2]], case.count)]
    assert said[:3] == said[3:]


def test_graphs_stay_few_as_texts_grow() -> None:
    """No pass is compiled twice, whatever the place, the prompt or the cache."""
    case, tracer = lively_case(1), Traced()
    verifier = CompiledModel(case.model, case.route, compiler=tracer)
    decoder = Decoder(verifier, case.drafter, case.method())
    for prompt in ([3, 4], list(range(20)), [7]):
        decoder.generate(prompt, 60)
    known = set(verifier._graphs)
    assert tracer.counter.frame_count == len(known) <= 2 * len(WIDTHS)
    decoder.generate([9, 1, 5, 5], 120)
    with torch.no_grad():  # callers differ in this, graphs must not
        verifier.full(row([4]), over(verifier.new_cache(9), 0, 1))
    assert tracer.counter.frame_count == len(verifier._graphs)
    assert {kind.capacity for kind in verifier._graphs} == {256}
    assert len(verifier._held) == 2  # what a text and the warm-up beside it took, each text found again


def test_passes_are_prepared_ahead() -> None:
    """Those of the texts' lengths and widths, once, and who listens is told; decoding then compiles nothing."""
    made: list[str] = []

    def compiler(run: StaticPass) -> StaticPass:
        made.append(run.__name__)  # type: ignore[attr-defined]
        return run

    model = CompiledModel(tiny_model(), ROUTE, compiler=compiler)
    noted = Noted()
    with reporting(noted):
        model.prepare_passes([7, 250, 256], 5)
    assert made == [f"{tier}_pass_{width}_of_256" for tier in ("full", "slim") for width in (1, 4, 8)]
    assert noted.told == [("compile", 6, "passes", 0, False), *[1] * 6, "finished"]
    with reporting(noted):
        model.prepare_passes([256], 8)
    model.full(row([3, 4, 5]), over(model.new_cache(100), 0, 3))
    assert len(made) == 6
    assert noted.told.count("finished") == 1
    model.slim(row(list(range(9))), over(model.new_cache(100), 0, 9))
    assert made[6:] == ["slim_pass_16_of_256"]


def test_slim_passes_are_left_out_on_request() -> None:
    model = in_python(tiny_model(), ROUTE)
    model.prepare_passes([9], 1, slim=False)
    assert [kind.full for kind in model._graphs] == [True]
    model.slim(row([4]), over(model.new_cache(9), 0, 1))
    assert [kind.full for kind in model._graphs] == [True, False]


def test_without_a_route_one_graph_serves_both() -> None:
    model = in_python(tiny_model(), Route())
    model.prepare_passes([9], 1)
    assert len(model._graphs) == 1
    model.slim(row([4]), over(model.new_cache(9), 0, 1))
    assert len(model._graphs) == 1


@torch.inference_mode()
def test_results_outlive_the_next_replay() -> None:
    """A CUDA graph puts its results at the same place each time."""
    places: dict[int, States] = {}

    def replayed(run: StaticPass) -> StaticPass:
        def call(*inputs: Any) -> States:
            states = run(*inputs)
            for own, new in zip(places.setdefault(id(run), states), states, strict=True):
                own.copy_(new)
            return places[id(run)]

        return call

    model = CompiledModel(tiny_model(), ROUTE, compiler=replayed)
    model.expect_taps((1, 3))
    cache = model.new_cache(9)
    states = model.full(row([3, 4, 5]), over(cache, 0, 3), (1, 3))
    before = States(*(one.clone() for one in states))
    model.full(row([9, 8, 7]), over(cache, 3, 3), (1, 3))
    assert all(torch.equal(*pair) for pair in zip(states, before, strict=True))


@torch.inference_mode()
def test_a_pass_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the graph too, which cannot."""
    model = in_python(tiny_model(), ROUTE)
    ids, cache = row([3, 4, 5]), model.new_cache(9)
    model.prepare_passes([9], 4)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    model.full(ids, over(cache, 0, 3))
    model.slim(ids, over(cache, 3, 3))


def test_texts_take_turns_in_the_same_memory() -> None:
    """As long as a text is held its memory is its own; the next one finds it empty, whoever writes into it."""
    model = in_python(tiny_model())
    with torch.inference_mode():
        first, second = model.new_cache(9), model.new_cache(200)
        places = {first.keys.data_ptr(), second.keys.data_ptr()}
        assert len(places) == 2
        first.mark_exact(3)
        first.keys.fill_(torch.nan)
        del first
        gc.collect()
    third = model.new_cache(12)
    assert {third.keys.data_ptr(), second.keys.data_ptr()} == places
    assert (third.exact, third.capacity) == (0, 256)
    assert not third.keys.any()
    third.keys.add_(1)  # outside of inference mode
    assert model.new_cache(9).keys.data_ptr() not in places


def test_a_cache_is_no_larger_than_the_context() -> None:
    context = 256  # of the tiny models
    assert static_capacity(context, context) == in_python(tiny_model()).new_cache(context).capacity == context
    with pytest.raises(PromptError, match="257 positions are asked for"):
        in_python(tiny_model()).new_cache(context + 1)


@pytest.mark.parametrize(("batch", "width", "taps"), [(2, 3, ()), (1, WIDTHS[-1] + 1, ()), (1, 3, (2,))])
@torch.inference_mode()
def test_other_passes_run_eager(batch: int, width: int, taps: tuple[int, ...]) -> None:
    """Batches, prompts, and taps that nobody expected."""
    model = CompiledModel(tiny_model(), ROUTE, compiler=lambda _: pytest.fail("a graph was made"))
    ids = torch.randint(VOCAB, (batch, width))
    eager = RoutedModel(tiny_model(), ROUTE)
    said, expected = (one.full(ids, over(one.new_cache(width, batch), 0, width), taps) for one in (model, eager))
    assert torch.equal(said.last, expected.last)
    assert torch.equal(said.tapped, expected.tapped)


def test_a_model_that_drafts_is_compiled_as_its_verifier_is() -> None:
    verifier = in_python(tiny_model())
    twin = verifier.alike(tiny_model(1))
    assert isinstance(twin, CompiledModel)
    assert twin._compiler is verifier._compiler
    assert type(RoutedModel(tiny_model()).alike(tiny_model(1))) is RoutedModel
    assert type(open_model(tiny_model(), Route(), {}, "eager")) is RoutedModel
