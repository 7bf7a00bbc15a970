"""Low bits as a part of a route: of what other parts left, row by row, beside a q that stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.clocks import MlpClock
from tests.rounding import assert_near, rounding
from tests.tiny import LAYERS, make_model, random_bridges, small_spec, tiny_config, tiny_model
from tests.toy_part import MeanUpdateEntry
from tests.unit.slim.test_compiled import TEXT, Traced, over, row
from viasd_calib.errors import JobWarning, MachineWarning, ModelError, SpecError
from viasd_calib.slim.backends import open_model, prepare
from viasd_calib.slim.checking import tensor_misfits
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.cost import sublayer_costs
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_routed
from viasd_calib.slim.lora_linear import LoRALinear
from viasd_calib.slim.low_bit import LowBitLinear, RoundedInputs, round_inputs
from viasd_calib.slim.native.library import why_no_kernels
from viasd_calib.slim.onednn_linear import can_pack
from viasd_calib.slim.parts.adapter import StoredAdapter, adapted_layers, adapter_tensors
from viasd_calib.slim.parts.base import FitInputs, parts_of, route_words
from viasd_calib.slim.parts.bridges import Bridge
from viasd_calib.slim.parts.low_bit import LowBit, LowBitOptions
from viasd_calib.slim.parts.mlp_keep import KeptNeurons
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import (
    AdapterRef,
    AddedMemory,
    BridgesRef,
    LowBitWeights,
    Route,
    TensorFile,
    load_spec,
    save_spec,
)

NARROW = {1: KeptNeurons(torch.arange(32).flip(0), 8)}
SOME = LowBitWeights(attention={"8": [1]}, mlp={"8": [1], "4": [2]}, head=8)
HELD = {"low_bit": SOME, "mlp_keep": NARROW, "head_vocab": torch.arange(5)}
"""The attention of layer 1, two MLPs, one of them narrow, and a reduced head."""
EVERY = [*range(LAYERS)]
WHOLE = LowBitWeights(attention={"8": EVERY}, mlp={"8": EVERY}, head=8)
TENSORS = TensorFile(path="some/tensors.safetensors", sha256="0" * 64)
CPU = torch.device("cpu")


def opened(held: dict[str, Any], route: Route | None = None, seed: int = 0) -> RoutedModel:
    return RoutedModel(copy.deepcopy(tiny_model(seed)), route, held)


def linears(sublayer: Sublayer) -> set[object]:
    """The kinds of the linear layers that a sublayer runs, and the bits of those that have low ones."""
    module: Any = sublayer.layer.self_attn if sublayer.kind == "attention" else sublayer.layer.mlp
    found = (child for name, child in module.named_children() if name.endswith("_proj"))
    return {child.rounded.bits if isinstance(child, LowBitLinear) else type(child) for child in found}


def slim_logits(routed: RoutedModel, ids: Sequence[int]) -> Tensor:
    """Logits of q' over a text that nobody has read before: [length, vocabulary]."""
    window = over(routed.new_cache(len(ids)), 0, len(ids))
    return routed.slim_logits(routed.slim(row(ids), window).last)[0]


def test_it_comes_last() -> None:
    entries = {"low_bit": SOME, "mean_update": MeanUpdateEntry(scale=1.0, tensors=TENSORS)}
    names = [part.name for part in parts_of(Route.model_validate(entries))]
    assert names == ["skips", "mean_update", "low_bit"]


@torch.no_grad()
def test_it_rounds_what_other_parts_made_and_leaves_the_full_verifier_alone() -> None:
    before = copy.deepcopy(tiny_model())
    routed = opened(HELD)
    assert [linears(one) for one in routed.slim_sublayers] == [
        {nn.Linear}, {nn.Linear}, {8}, {8}, {nn.Linear}, {4}, {nn.Linear}, {nn.Linear}
    ]  # fmt: skip
    assert routed.slim_layers[1].mlp.down_proj.in_features == 8  # type: ignore[union-attr]
    assert {kind for one in routed.full_sublayers for kind in linears(one)} == {nn.Linear}
    hidden = torch.randn(3, routed.config.hidden_size)
    whole, rounded = routed.logits(hidden)[:, :5], routed.slim_logits(hidden)[:, :5]
    assert not torch.equal(whole, rounded)
    torch.testing.assert_close(rounded, whole, atol=0.05, rtol=0.05)
    assert torch.isinf(routed.slim_logits(hidden)[:, 5:]).all()
    untouched, own = opened({"mlp_keep": NARROW}), RoutedModel(before)
    for name, weight in own.model.state_dict().items():
        if ".layers.1.mlp." not in name:  # whose neurons another part has put into order
            assert torch.equal(weight, routed.model.state_dict()[name])
    window = over(routed.new_cache(len(TEXT)), 0, len(TEXT))
    same = over(untouched.new_cache(len(TEXT)), 0, len(TEXT))
    assert torch.equal(routed.full(row(TEXT), window).last, untouched.full(row(TEXT), same).last)


@torch.no_grad()
def test_the_whole_head_is_no_index_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = opened({"low_bit": LowBitWeights(head=8)})
    monkeypatch.setattr("viasd_calib.slim.forward.over_vocabulary", None)
    hidden = torch.randn(3, routed.config.hidden_size)
    assert routed.slim_logits(hidden).shape == (3, routed.config.vocab_size)
    torch.testing.assert_close(routed.slim_logits(hidden), routed.logits(hidden), atol=0.05, rtol=0.05)
    assert not torch.equal(routed.slim_logits(hidden), routed.logits(hidden))


@pytest.mark.parametrize("input_bits", [16, 8])
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits(input_bits: int) -> None:
    routed = opened({"low_bit": WHOLE.model_copy(update={"input_bits": input_bits})})
    first, second = slim_logits(routed, TEXT), slim_logits(routed, [*TEXT[:-1], 1])
    assert torch.equal(first[:-1], second[:-1])
    assert not torch.equal(first[-1], second[-1])


def rounded_by_tensor(inputs: Tensor, bits: Any) -> RoundedInputs:
    """The same with one step for all rows."""
    largest = inputs.abs().amax(1).argmax()
    steps = round_inputs(inputs[largest : largest + 1], bits).steps[0, 0]
    return RoundedInputs((inputs / steps).round()[None], steps.expand(1, len(inputs), 1))


@torch.no_grad()
def test_one_step_a_tensor_would_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viasd_calib.slim.low_bit.round_inputs", rounded_by_tensor)
    routed = opened({"low_bit": WHOLE.model_copy(update={"input_bits": 8})})
    changed = [
        (slim_logits(routed, TEXT)[:-1] - slim_logits(routed, [*TEXT[:-1], last])[:-1]).abs().max()
        for last in range(10)
    ]
    assert float(max(changed)) > 100 * rounding(slim_logits(routed, TEXT))


@torch.no_grad()
def test_it_runs_beside_skips_and_bridges() -> None:
    low = LowBitWeights(attention={"8": [0]}, mlp={"4": [0, 2, 3]})
    route = Route(attention_skip=[1, 2], mlp_skip=[1], low_bit=low)
    bridges = random_bridges(route, carry=True)
    routed = opened(
        {"bridges": bridges, "low_bit": low},
        route.model_copy(update={"bridges": BridgesRef(carry=True, tensors=TENSORS)}),
    )
    kinds = [one.kind if isinstance(one.layer, Bridge) else linears(one) for one in routed.slim_sublayers]
    assert kinds == [{8}, {4}, "bridge", {4}, {nn.Linear}, {4}]
    assert slim_logits(routed, TEXT).isfinite().all()


def stored_adapter(folded: bool) -> tuple[AdapterRef, StoredAdapter]:
    """An adapter on two projections of every layer, and its entry."""
    torch.manual_seed(1)
    tensors = adapter_tensors(adapted_layers(tiny_model().model.layers, 2, 4, ["q_proj", "down_proj"]))  # type: ignore[union-attr]
    noise = {name: 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    ref = AdapterRef(rank=2, alpha=4, targets=["q_proj", "down_proj"], folded=folded, tensors=TENSORS)
    return ref, StoredAdapter(Path("adapter.safetensors"), noise)


@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_it_rounds_what_an_adapter_sits_on(folded: bool) -> None:
    ref, stored = stored_adapter(folded)
    plain = opened({"adapter": stored}, Route(adapter=ref))
    routed = opened({"adapter": stored, "low_bit": WHOLE}, Route(adapter=ref, low_bit=WHOLE))
    query: Any = routed.slim_layers[2].self_attn.q_proj  # type: ignore[union-attr]
    if folded:
        assert isinstance(query, LowBitLinear)
    else:
        assert isinstance(query, LoRALinear)
        assert isinstance(query.base, LowBitLinear)
        assert {type(query.down), type(query.up)} == {nn.Linear}
    found, wanted = slim_logits(routed, TEXT), slim_logits(plain, TEXT)
    assert not torch.equal(found, wanted)
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.7


def test_what_is_trained_below_has_gradients() -> None:
    routed = opened({"low_bit": WHOLE})
    hidden = torch.randn(1, 3, 16, requires_grad=True)
    layer: Any = routed.slim_layers[0]
    layer.mlp(hidden).square().sum().backward()
    exact = hidden.detach().clone().requires_grad_(True)
    routed.layers[0].mlp(exact).square().sum().backward()  # type: ignore[operator, union-attr]
    assert hidden.grad is not None
    assert exact.grad is not None
    assert float(torch.cosine_similarity(hidden.grad.flatten(), exact.grad.flatten(), 0)) > 0.99


def test_a_verifier_that_is_packed_is_refused() -> None:
    if not can_pack(CPU, torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    model = copy.deepcopy(tiny_model())
    prepare([model], "packed", CPU, torch.float32)
    with pytest.raises(ModelError, match="packed or read for another decoder; load it anew"):
        RoutedModel(model, held={"low_bit": WHOLE})


class LinearClock(MlpClock):
    """A verifier whose MLPs alone take time: a second for each neuron, half of it in low bits."""

    def seconds_of(self, sublayer: Sublayer) -> float:
        mlp: Any = sublayer.layer.mlp
        return float(mlp.down_proj.in_features * (1 if linears(sublayer) == {nn.Linear} else 0.5))


def test_each_sublayer_is_charged_with_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LinearClock(copy.deepcopy(tiny_model()), held=HELD)
    monkeypatch.setattr("viasd_calib.slim.cost.time", clock)
    assert sublayer_costs(clock, repeats=2).shares.tolist() == [0, 0.25, 0, 0.03125, 0, 0.125, 0, 0.25]


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this PyTorch has no oneDNN")
@torch.inference_mode()
def test_backends_without_kernels_run_it_and_say_that_it_is_no_faster() -> None:
    eager = opened(HELD)
    compiled = CompiledModel(copy.deepcopy(tiny_model()), held=HELD, compiler=Traced())
    with pytest.warns(
        MachineWarning, match="backend packed runs sublayers in low bits, but no faster than others"
    ) as told:
        prepare((compiled.model, *compiled.slim_networks), "packed", compiled.device, compiled.dtype)
    assert len(told) == 1
    kinds = [linears(one) for one in compiled.slim_sublayers]
    assert [bool(one & {8, 4}) for one in kinds] == [False, False, True, True, False, True, False, False]
    assert all(nn.Linear not in one for one in kinds)
    ours, theirs = (
        model.slim_logits(model.slim(row(TEXT), over(model.new_cache(len(TEXT)), 0, len(TEXT))).last)[..., :5]
        for model in (compiled, eager)
    )
    assert_near(ours, theirs)


@pytest.mark.skipif(why_no_kernels(CPU, torch.bfloat16) is not None, reason="the kernels do not run here")
@torch.inference_mode()
def test_backend_native_runs_it(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.08}
    model = make_model(tiny_config(**sizes, head_dim=32)).to(torch.bfloat16)
    route = Route(low_bit=WHOLE)
    reference = RoutedModel(copy.deepcopy(model), route, {"low_bit": WHOLE})
    native = open_model(model, route, {"low_bit": WHOLE}, "native")
    prepare((model, *native.slim_networks), "native", CPU, torch.bfloat16)
    assert not [one for one in recwarn if issubclass(one.category, MachineWarning)]
    assert not [one for module in native.slim_networks for one in module.modules() if isinstance(one, LowBitLinear)]
    found, wanted = slim_logits(native, TEXT), slim_logits(reference, TEXT)
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)
    later = slim_logits(native, [*TEXT[:-1], 1])
    assert torch.equal(found[:-1], later[:-1])


def test_its_memory_is_that_of_the_copy() -> None:
    routed = opened({"low_bit": WHOLE})
    inner, head = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32, 24 * 16
    rows = LAYERS * (16 + 8 + 8 + 16 + 32 + 32 + 16) + 24
    assert routed.memory.bytes == LAYERS * inner + head + 4 * rows
    assert routed.memory.share == pytest.approx(routed.memory.bytes / (2 * routed.model.num_parameters()), abs=1e-4)
    assert opened({}).memory == AddedMemory(bytes=0, share=0.0)
    assert opened({"mlp_keep": NARROW}).memory.bytes == 0  # views of q's own
    assert opened({"head_vocab": torch.arange(5)}).memory.bytes == 2 * 5 * 16


def test_memory_of_an_adapter_is_that_of_decoding() -> None:
    route = Route(attention_skip=[1], mlp_skip=[1])
    counted: dict[bool, list[int]] = {}
    for folded in (False, True):
        ref, stored = stored_adapter(folded)
        given = route.model_copy(update={"adapter": ref})
        loaded = opened({"adapter": stored}, given)
        model = copy.deepcopy(tiny_model())
        trained = adapted_layers(model.model.layers, 2, 4, ref.targets)  # type: ignore[union-attr]
        counted[folded] = [loaded.memory.bytes, RoutedModel(model, given, {"adapter": trained}).memory.bytes]
    kept = LAYERS - 1
    assert counted[False] == [2 * kept * 2 * (16 + 16 + 32 + 16)] * 2
    assert counted[True] == [2 * kept * (16 * 16 + 32 * 16)] * 2


def test_it_has_words_and_marks() -> None:
    route = Route(low_bit=WHOLE, memory=AddedMemory(bytes=134_500_000, share=0.5012))
    assert route_words(route, LAYERS) == (
        "4 of 4 attention and 4 of 4 MLP sublayers kept, all sublayers in 8 bits, head in 8 bits, "
        "0.5 of q's memory more (134.5 MB)"
    )
    some = Route(low_bit=SOME.model_copy(update={"input_bits": 8}))
    assert LowBit().line(some, LAYERS) == (
        "2 sublayers in 8 bits, 1 sublayer in 4 bits, head in 8 bits, their inputs in 8 bits"
    )
    marks = [(mark.row, mark.first, mark.label, mark.share) for mark in LowBit().drawing(some, LAYERS)]
    assert marks == [("attention", 1, "in 8 bits", 0.5), ("mlp", 1, "in 8 bits", 0.5), ("mlp", 2, "in 4 bits", 0.25)]


def test_a_spec_holds_it_without_tensors(tmp_path: Path) -> None:
    spec = small_spec(route=Route(attention_skip=[2], low_bit=SOME))
    save_spec(spec, tmp_path / "routing.json")
    again = load_spec(tmp_path / "routing.json")
    assert again.route == spec.route
    assert not again.route.files
    assert not tensor_misfits(again, tmp_path)
    routed = load_routed(copy.deepcopy(tiny_model()), again.route, tmp_path)
    assert linears(routed.slim_sublayers[2]) == {8}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "low_bit names neither a sublayer nor the head; name some, or leave low_bit out"),
        ({"mlp": {"8": [1, 1]}}, r"layers of low_bit\.mlp must be given once each, in rising order"),
        ({"mlp": {"8": [2, 1]}}, r"layers of low_bit\.mlp must be given once each, in rising order"),
        ({"attention": {"8": [0, 1], "4": [1]}}, r"low_bit\.attention names layer 1 twice, in 8 and in 4 bits"),
        ({"attention": {"8": []}}, "at least 1 item"),
        ({"attention": {"8": [-1]}}, "greater than or equal to 0"),
        ({"attention": {"3": [1]}}, "Input should be '8' or '4'"),
        ({"head": 3}, "Input should be 8 or 4"),
        ({"head": 8, "group": 32}, "Input should be 64"),
        ({"head": 8, "rule": "learned"}, "Input should be 'nearest'"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LowBitWeights.model_validate(entry)


def test_a_sublayer_that_is_skipped_or_not_there_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"low_bit\.mlp and mlp_skip both name layer 1; .* take it out of one"):
        Route(mlp_skip=[1], low_bit=SOME)
    beyond = LowBitWeights(attention={"4": [LAYERS]})
    with pytest.raises(ValidationError, match=rf"route\.low_bit\.attention names layer {LAYERS}.* 0 to {LAYERS - 1}"):
        small_spec(route=Route(low_bit=beyond))


def fitted(route: Route, **options: Any) -> LowBitWeights | None:
    return LowBit().fit(FitInputs(opened({}), route, [], None), LowBitOptions.model_validate(options))  # type: ignore[arg-type]


def test_a_fit_names_the_sublayers_that_the_route_keeps() -> None:
    assert fitted(Route()) == WHOLE
    route = Route(attention_skip=[1, 2], mlp_skip=[1])
    found = fitted(route, bits=4, mlp={"16": [0], "8": [1, 3]}, head=8, input_bits=8)
    assert found == LowBitWeights(attention={"4": [0, 3]}, mlp={"4": [2], "8": [3]}, head=8, input_bits=8)
    assert fitted(Route(), head=16, attention={"16": EVERY}) == LowBitWeights(mlp={"8": EVERY})
    assert fitted(route, mlp=4) == LowBitWeights(attention={"8": [0, 3]}, mlp={"4": [0, 2, 3]}, head=8)
    with pytest.raises(SpecError, match=f"mlp names layer {LAYERS}, the verifier has layers 0 to {LAYERS - 1}"):
        fitted(Route(), mlp={"4": [LAYERS]})


def test_options_without_low_bits_are_refused() -> None:
    for given in ({"bits": 16}, {"attention": 16, "mlp": 16, "head": 16}, {"bits": 16, "mlp": {"16": [0]}}):
        with pytest.raises(ValidationError, match=r"everything has 16 bits.*leave low_bit out"):
            LowBitOptions.model_validate(given)
    for low in ({"bits": 16, "head": 4}, {"bits": 16, "mlp": {"8": [1]}}, {"head": 16, "mlp": 16}):
        assert LowBitOptions.model_validate(low)


@pytest.mark.parametrize("asked", [{"4": [1, 2], "8": [2]}, {"4": [2, 2]}])
def test_a_layer_that_options_name_twice_is_refused(asked: dict[str, list[int]]) -> None:
    """Else the list that comes last would decide, whichever was meant."""
    for kind in ("attention", "mlp"):
        with pytest.raises(ValidationError, match=f"{kind} names layer 2 twice"):
            LowBitOptions.model_validate({kind: asked})


def test_a_route_that_skips_all_that_options_name_has_no_low_bits() -> None:
    with pytest.warns(JobWarning, match="keeps none of the sublayers that low_bit names"):
        assert fitted(Route(attention_skip=[1], mlp_skip=[2]), bits=16, attention={"8": [1]}, mlp={"4": [2]}) is None
