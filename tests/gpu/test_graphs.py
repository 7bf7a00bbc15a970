"""Backend ``compiled`` on the device: CUDA graphs that give what eager passes give, and are replayed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny import noisy_copy, tiny_model
from tests.unit.slim.test_compiled import ROUTE, TEXT, Traced, assert_alike, over
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.slim.compiled import CompiledModel, compile_whole
from viasd_calib.slim.forward import RoutedModel

pytestmark = pytest.mark.gpu

TOKENS = 40
LAYERS = 3
"""As few as the route has, since each graph takes seconds to compile."""


@dataclass
class Graphs:
    """What was recorded and replayed since the last call of :meth:`clear`; on a CPU, what was traced."""

    recorded: int = 0
    replayed: int = 0

    def clear(self) -> None:
        """Begin to count anew."""
        self.recorded = self.replayed = 0


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Counts CUDA graphs through torch's public classes, which TorchInductor records and replays with."""
    counts = Graphs()
    begin, replay = torch.cuda.graph.__enter__, torch.cuda.CUDAGraph.replay

    def counted_begin(self: Any) -> None:
        counts.recorded += 1
        begin(self)

    def counted_replay(self: Any) -> None:
        counts.replayed += 1
        replay(self)

    monkeypatch.setattr(torch.cuda.graph, "__enter__", counted_begin)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted_replay)
    return counts


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled_model(model: PreTrainedModel, device: torch.device) -> CompiledModel:
    """Compiled by TorchInductor on a GPU; on a CPU traced as strictly, and run operation by operation."""
    compiler: Any = compile_whole if device.type == "cuda" else Traced()
    return CompiledModel(placed(model, device), ROUTE, compiler=compiler)


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy of a model on the device."""
    copied: Any = copy.deepcopy(model)  # mypy misreads what decorates transformers' `to`
    return copied.to(device)  # type: ignore[no-any-return]


@torch.inference_mode()
def test_passes_give_what_eager_ones_give(device: torch.device, graphs: Graphs) -> None:
    """Logits, keys and values of q and q' up to rounding, by graphs that are replayed."""
    model = tiny_model(0, "qwen2_sliding", layers=LAYERS)
    compiled = compiled_model(model, device)
    assert_alike(compiled, RoutedModel(placed(model, device), ROUTE))
    assert compiled._graphs
    if device.type == "cuda":
        assert graphs.recorded > 0
        assert graphs.replayed > 0


@torch.inference_mode()
def test_results_outlive_the_next_replay(device: torch.device) -> None:
    """A CUDA graph puts its results at the same place each time."""
    model = compiled_model(tiny_model(0, layers=LAYERS), device)
    cache = model.new_cache(len(TEXT))
    first = model.full(torch.tensor([TEXT[:3]], device=device), over(cache, 0, 3)).last
    kept = first.clone()
    model.full(torch.tensor([TEXT[3:6]], device=device), over(cache, 3, 3))
    assert torch.equal(first, kept)


def texts_of(model: RoutedModel, strategy: Strategy, prompts: list[list[int]]) -> list[list[int]]:
    """Texts that a strategy writes with a draft model that is right part of the time."""
    draft = RoutedModel(placed(noisy_copy(1), model.device))
    decoder = Decoder(model, CausalDrafter(draft, model.config.vocab_size), strategy)
    return [decoder.generate(prompt, TOKENS).tokens for prompt in prompts]


def test_a_second_text_records_nothing_anew(
    device: torch.device, graphs: Graphs, record_property: Callable[[str, object], None]
) -> None:
    """After one text of each width the graphs are there: another text of another length replays them."""
    model = compiled_model(tiny_model(1, layers=LAYERS), device)
    model.prepare_passes([TOKENS], 8, slim=False)
    decoder = Decoder(model, None, Autoregressive())
    decoder.generate([3, 4, 5], TOKENS)
    known, recorded = set(model._graphs), graphs.recorded
    graphs.clear()
    decoder.generate([9, 1, 5, 5, 7, 2, 8], TOKENS)
    record_property("recorded_for_the_first_text", recorded)
    record_property("recorded_for_the_second_text", graphs.recorded)
    record_property("replayed_for_the_second_text", graphs.replayed)
    assert set(model._graphs) == known
    assert graphs.recorded == 0
    if device.type == "cuda":
        assert graphs.replayed >= TOKENS - 1


def test_decoding_is_token_identical(device: torch.device) -> None:
    """In float32, over passes of several widths."""
    prompts = [[3, 4, 5], [9, 1, 5, 5, 7, 2, 8]]
    found = texts_of(compiled_model(tiny_model(1, layers=LAYERS), device), Speculative(3), prompts)
    wanted = texts_of(RoutedModel(placed(tiny_model(1, layers=LAYERS), device), ROUTE), Autoregressive(), prompts)
    assert found == wanted


def test_threads_take_turns(device: torch.device) -> None:
    """Two threads decode with one model at the same time, and each writes the text that it writes alone."""
    model = compiled_model(tiny_model(1, layers=LAYERS), device)
    model.prepare_passes([TOKENS], 1, slim=False)
    prompts = [[3, 4, 5], [9, 1, 5, 5, 7, 2, 8]]
    wanted = [Decoder(model, None, Autoregressive()).generate(prompt, TOKENS).tokens for prompt in prompts]
    found: dict[int, list[int]] = {}
    errors: list[Exception] = []

    def decode(number: int) -> None:
        try:
            found[number] = Decoder(model, None, Autoregressive()).generate(prompts[number], TOKENS).tokens
        except Exception as error:  # shown below
            errors.append(error)

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [found[number] for number in range(len(prompts))] == wanted
