"""Several texts at a time on one engine: each is the text that it is alone, and took what it takes alone."""

from __future__ import annotations

import copy
import itertools
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Condition
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.tiny import (
    DRAFTERS,
    VOCAB,
    constant_gate,
    make_drafter,
    make_model,
    random_bridges,
    tiny_config,
    tiny_model,
    tiny_shallow,
    verifier_ref,
)
from viasd_calib.choices import BACKENDS, Backend, StrategyName
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.sampling import Sampling, seed_of_text
from viasd_calib.decoding.session import Generation
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.shallow import ShallowDrafter
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.compiled import CompiledModel, StaticPass
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.native.model import NativeModel
from viasd_calib.slim.onednn_linear import can_pack
from viasd_calib.spec import Audit, Decoding, Gates, PromptLookupDraft, Route, RoutingSpec

ROUTE = Route(attention_skip=[1], mlp_skip=[1])
GATES = Gates(
    draft=constant_gate("draft_margin", 0.0).model_copy(update={"weight": [1.0]}),
    slim=constant_gate("slim_margin", 0.0).model_copy(update={"weight": [1.0]}),
    draft_accept_at=0.65, draft_stop_below=0.3, accept_at=0.55, regenerate_at=0.55,
)  # fmt: skip
SPEC = RoutingSpec(
    verifier=verifier_ref(),
    draft=PromptLookupDraft(),
    route=ROUTE,
    gates=GATES,
    decoding=Decoding(draft_length=4, max_pending=9),
)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 9, 8]]
COUNT = 8


@dataclass(frozen=True)
class Asked:
    """A request, as a server meets it."""

    name: StrategyName
    audit: Audit | None
    prompt: list[int]
    sampling: Sampling

    def decoder(self, engine: Engine) -> Decoder:
        return engine.decoder(self.name, self.audit, self.sampling)

    def alone(self, engine: Engine) -> Generation:
        return self.decoder(engine).generate(self.prompt, COUNT)


def requests(names: Sequence[StrategyName] = get_args(StrategyName)) -> list[Asked]:
    """Of every method, and of three tiers with every audit: prompts of any length, greedily and sampled in turn."""
    kinds = [(name, audit) for name in names for audit in (get_args(Audit) if name == "three_tier" else (None,))]
    return [
        Asked(name, audit, PROMPTS[number % 4], Sampling(temperature=0.9 * (number % 2), seed=number))
        for number, (name, audit) in enumerate(kinds)
    ]


def engine_of(routed: RoutedModel, drafter: Drafter) -> Engine:
    routed.expect_taps(drafter.taps)
    verifier: Any = _Verifier(routed)
    return Engine(SPEC, verifier, routed, drafter)


@dataclass(frozen=True)
class _Verifier:
    """As much of a verifier as decoding asks for."""

    routed: RoutedModel
    tokenizer: None = None
    eos_ids: frozenset[int] = frozenset({2})


class Turns:
    """Lets one thread at a time run, each for one round of its text."""

    def __init__(self, count: int) -> None:
        self._waiting = deque(range(count))
        self._changed = Condition()

    def generate(self, number: int, asked: Asked, engine: Engine) -> Generation:
        def next_round() -> bool:
            with self._changed:
                self._waiting.rotate(-1)
                self._changed.notify_all()
                self._wait(number)
            return False

        with self._changed:
            self._wait(number)
        try:
            return asked.decoder(engine).generate(asked.prompt, COUNT, cancelled=next_round)
        finally:
            with self._changed:
                self._waiting.remove(number)
                self._changed.notify_all()

    def _wait(self, number: int) -> None:
        assert self._changed.wait_for(lambda: self._waiting[0] == number, timeout=60)


def in_turns(engine: Engine, asked: Sequence[Asked]) -> list[Generation]:
    """Round by round, in a thread each."""
    turns = Turns(len(asked))
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda pair: turns.generate(*pair, engine), enumerate(asked)))


def at_once(engine: Engine, asked: Sequence[Asked]) -> list[Generation]:
    """In threads that get in each other's way wherever they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda one: one.alone(engine), asked))
    finally:
        sys.setswitchinterval(usual)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_text_is_what_it_is_alone(kind: str) -> None:
    """Whatever else is decoded, by whichever method; tokens, tiers and counts."""
    routed = RoutedModel(tiny_model(), ROUTE, {"bridges": random_bridges(ROUTE, carry=True)})
    engine, asked = engine_of(routed, make_drafter(kind, routed)), requests()
    alone = [one.alone(engine) for one in asked]
    assert in_turns(engine, asked) == alone
    assert sum(one.counts.draft_steps for one in alone) > 0


@pytest.mark.parametrize("kind", ["near", "shallow"])
def test_streams_may_be_read_in_turns(kind: str) -> None:
    """In one thread; between their tokens the caller is in no mode of ours."""
    routed = RoutedModel(tiny_model(), ROUTE)
    engine, asked = engine_of(routed, make_drafter(kind, routed)), requests()
    streams = {number: one.decoder(engine).stream(one.prompt, COUNT) for number, one in enumerate(asked)}
    found: list[list[int]] = [[] for _ in asked]
    while streams:
        for number, stream in list(streams.items()):
            emitted = next(stream, None)
            assert not torch.is_inference_mode_enabled()
            if emitted is None:
                del streams[number]
            else:
                found[number].append(emitted.token)
    assert found == [one.alone(engine).tokens for one in asked]


def test_a_stream_may_be_read_in_inference_mode_and_left_outside() -> None:
    routed = RoutedModel(tiny_model(), ROUTE)
    engine = engine_of(routed, make_drafter("shallow", routed))
    whole = engine.decoder("three_tier").generate(PROMPTS[0], COUNT).tokens
    stream = engine.decoder("three_tier").stream(PROMPTS[0], COUNT)
    with torch.inference_mode():
        first = [next(stream).token for _ in range(3)]
        assert torch.is_inference_mode_enabled()
    assert [*first, *(emitted.token for emitted in stream)] == whole
    assert torch.ones(1, requires_grad=True).requires_grad


def test_one_decoder_serves_several_texts() -> None:
    """Each draws what a decoder with its seed would draw; they are numbered in the order of the calls."""
    routed = RoutedModel(tiny_model(), ROUTE)
    engine, sampling = engine_of(routed, make_drafter("near", routed)), Sampling(temperature=1.0, seed=7)
    expected = [
        engine.decoder("speculative", sampling=replace(sampling, seed=seed_of_text(7, number))).generate(prompt, COUNT)
        for number, prompt in enumerate(PROMPTS)
    ]
    decoder = engine.decoder("speculative", sampling=sampling)
    streams = [decoder.stream(prompt, COUNT) for prompt in PROMPTS[:3]]
    last = decoder.generate(PROMPTS[3], COUNT)
    found = [[emitted.token for emitted in stream] for stream in reversed(streams)]
    assert [*reversed(found), last.tokens] == [one.tokens for one in expected]
    assert decoder.generate_batch(PROMPTS, COUNT) == expected
    assert [decoder.generate(PROMPTS[2], COUNT, number=2) for _ in range(2)] == [expected[2]] * 2


def replayed(run: StaticPass) -> StaticPass:
    """Puts all results of a pass at the same place, as a CUDA graph does."""
    places: list[Tensor] = []

    def call(*inputs: Any) -> States:
        states = run(*inputs)
        if not places:
            places.extend(state.clone() for state in states)
        for place, state in zip(places, states, strict=True):
            place.copy_(state)
        return States(*places)

    return call


def drafter_of(kind: str, routed: RoutedModel, backend: Backend) -> Drafter:
    """A drafter whose model runs on the backend."""
    if kind.startswith("lookup+"):
        return CombinedDrafter(drafter_of(kind.removeprefix("lookup+"), routed, backend), VOCAB, 3, 2)
    drafter: Drafter
    if kind == "shallow":
        drafter = ShallowDrafter(tiny_shallow(routed))
    else:
        disturbed = copy.deepcopy(routed.model)  # of sizes that the backend knows, too
        for weight in disturbed.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
        drafter = CausalDrafter(routed.alike(disturbed), VOCAB)
    prepare(drafter.networks, backend, routed.device, routed.dtype)
    return drafter


def engine_on(backend: Backend, kind: str) -> Engine:
    """A tiny verifier with a drafter on a backend; skips the test where it does not run."""
    if backend == "packed" and not can_pack(torch.device("cpu"), torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    model = copy.deepcopy(tiny_model())
    if backend == "native":
        if why_no_kernels(torch.device("cpu"), torch.bfloat16) is not None:
            pytest.skip("the kernels do not run here")
        model = make_model(tiny_config(head_dim=32)).to(torch.bfloat16)
    kinds = {"compiled": partial(CompiledModel, compiler=replayed), "native": NativeModel}
    routed = kinds.get(backend, RoutedModel)(model, ROUTE)
    engine = engine_of(routed, drafter_of(kind, routed, backend))
    prepare([model, *routed.slim_networks], backend, routed.device, routed.dtype)
    return engine


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["near", "lookup+shallow"])
def test_every_backend_serves_threads(kind: str, backend: Backend) -> None:
    engine, asked = engine_on(backend, kind), requests(["speculative", "three_tier"])
    assert at_once(engine, asked) == [one.alone(engine) for one in asked]


@pytest.mark.parametrize(
    ("kind", "audit"),
    [*itertools.product(["near", "lookup+near"], get_args(Audit)), ("lookup+shallow", "strict")],
)
def test_a_batch_is_each_text_alone_in_bfloat16_where_the_kernels_run_all(kind: str, audit: Audit) -> None:
    """Tokens, tiers and counts; with a shallow drafter, which they run for single texts alone, the tokens of strict."""
    engine = engine_on("native", kind)
    assert engine.routed.dtype == torch.bfloat16
    prompts = [[(number * step) % VOCAB for step in range(3, 6 + number % 9)] for number in range(2, 26)]
    alone = [engine.decoder("three_tier", audit).generate(prompt, 3 * COUNT) for prompt in prompts]
    together = engine.decoder("three_tier", audit).generate_batch(prompts, 3 * COUNT, batch_size=7)
    assert {tier for one in alone for tier in one.tiers} == {*Tier}
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    if kind != "lookup+shallow":
        assert together == alone
    assert engine.same_in_batches is (kind != "lookup+shallow")
