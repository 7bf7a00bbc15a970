"""MLP width: q says what it said in any order of its neurons, q' what q says without the others; no copy is made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.strategies import families
from tests.tiny import TINY_FAMILIES, make_model, tiny_config, tiny_model
from viasd_calib.errors import ModelError, SpecError
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.compiled import CompiledModel
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_routed
from viasd_calib.slim.onednn_linear import can_pack
from viasd_calib.slim.parts.adapter import adapted_layers, adapter_ref, adapter_tensors, save_adapter
from viasd_calib.slim.parts.base import Sizes, load_parts
from viasd_calib.slim.parts.mlp_keep import (
    KeptNeurons,
    MlpKeep,
    NarrowMLP,
    narrow_layers,
    neuron_order,
    save_widths,
)
from viasd_calib.spec import Route

NEURONS = 32
TEXT = torch.tensor([[5, 1, 17, 3, 3, 9, 20]])


def order_of(seed: int) -> Tensor:
    return torch.randperm(NEURONS, generator=torch.Generator().manual_seed(seed))


def kept(keep: int, seed: int = 0) -> KeptNeurons:
    return KeptNeurons(order_of(seed), keep)


@torch.inference_mode()
def logits(routed: RoutedModel, *, slim: bool) -> Tensor:
    width = TEXT.shape[1]
    window = CacheWindow(routed.new_cache(width), 0, width, width)
    return routed.logits((routed.slim if slim else routed.full)(TEXT, window).last)


def narrowed(model: PreTrainedModel, widths: dict[int, KeptNeurons]) -> RoutedModel:
    return RoutedModel(model, held={"mlp_keep": narrow_layers(model.get_decoder().layers, widths)})


def without_neurons(model: PreTrainedModel, widths: dict[int, KeptNeurons]) -> PreTrainedModel:
    """A copy of a model whose other neurons add nothing: their columns of the down projections are zero."""
    cut = copy.deepcopy(model)
    for layer, (order, keep) in widths.items():
        cut.get_decoder().layers[layer].mlp.down_proj.weight[:, order[keep:]] = 0
    return cut


def biased_model() -> PreTrainedModel:
    return make_model(tiny_config(mlp_bias=True))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(
    family=families(),
    keeps=st.dictionaries(st.integers(0, 3), st.integers(1, NEURONS - 1), min_size=1),
    seed=st.integers(0, 9),
)
def test_q_stays_what_it_was_and_a_narrow_mlp_is_one_without_the_other_neurons(
    family: str, keeps: dict[int, int], seed: int
) -> None:
    model = copy.deepcopy(tiny_model(0, family))
    widths = {layer: kept(keep, seed + layer) for layer, keep in keeps.items()}
    before = logits(RoutedModel(model), slim=False)
    cut = logits(RoutedModel(without_neurons(model, widths)), slim=False)
    routed = narrowed(model, widths)
    close(logits(routed, slim=False), before)
    close(logits(routed, slim=True), cut)


@pytest.mark.parametrize("make", [biased_model, lambda: copy.deepcopy(tiny_model(0, "phi3"))], ids=["biases", "fused"])
def test_prefixes_are_views_of_the_verifiers_weights(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    cut = without_neurons(model, {1: kept(5)})
    routed = narrowed(model, {1: kept(5)})
    close(logits(routed, slim=True), logits(RoutedModel(cut), slim=False))
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in routed.slim_layers.parameters()} <= theirs
    mlp = routed.slim_layers[1].mlp
    assert isinstance(mlp, NarrowMLP)
    assert (mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features) == (5, 5, 5)
    assert not isinstance(routed.slim_layers[0].mlp, NarrowMLP)


def test_another_order_is_taken_from_the_first_one_and_leaves_what_was_made_for_it() -> None:
    """Two specs on one loaded verifier: the second finds its neurons, the first one's q' stays what it was."""
    model = copy.deepcopy(tiny_model())
    cut = logits(RoutedModel(without_neurons(model, {1: kept(9, seed=1)})), slim=False)
    first = narrowed(model, {1: kept(9, seed=0)})
    said = logits(first, slim=True)
    second = narrowed(copy.deepcopy(model), {1: kept(9, seed=1)})  # a copy knows its order too
    close(logits(second, slim=True), cut)
    close(logits(narrowed(model, {1: kept(9, seed=1)}), slim=True), cut)
    assert torch.equal(logits(first, slim=True), said)
    assert torch.equal(neuron_order(model.get_decoder().layers[1].mlp), order_of(1))
    assert "neuron_order" not in " ".join(model.state_dict())


def test_the_same_order_again_touches_nothing() -> None:
    model = copy.deepcopy(tiny_model())
    narrowed(model, {1: kept(9)})
    before = [id(parameter) for parameter in model.parameters()]
    narrowed(model, {1: kept(4)})
    assert [id(parameter) for parameter in model.parameters()] == before


def test_weights_that_can_be_trained_still_can() -> None:
    model = copy.deepcopy(tiny_model()).requires_grad_(True)
    routed = narrowed(model, {1: kept(9)})
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in routed.slim_layers[1].mlp.parameters())


def saved(folder: Path, widths: dict[int, KeptNeurons], route: Route | None = None) -> Route:
    """A route whose widths lie in ``folder``."""
    reference = save_widths(widths, folder / "slim" / "widths.safetensors", folder)
    return (route or Route()).model_copy(update={"mlp_keep": reference})


SIZES = Sizes.of_config(tiny_model().config)
WIDTHS = {1: kept(9, seed=1), 3: kept(20, seed=3)}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    route = saved(tmp_path, WIDTHS, Route(mlp_skip=[2]))
    assert route.mlp_keep is not None
    assert route.mlp_keep.keep == {1: 9, 3: 20}
    model = copy.deepcopy(tiny_model())
    cut = logits(RoutedModel(without_neurons(model, WIDTHS), Route(mlp_skip=[2])), slim=True)
    close(logits(load_routed(model, route, tmp_path), slim=True), cut)
    assert load_parts(Route(), Path("nowhere"), SIZES) == {}


TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: PreTrainedModel, folder: Path) -> tuple[RoutedModel, Route]:
    """Narrow layers with an adapter as it is trained, and the route that names both."""
    layers = narrow_layers(model.get_decoder().layers, WIDTHS)
    trained = adapted_layers(layers, 2, 4, TARGETS).eval()
    with torch.no_grad():
        for number, tensor in enumerate(adapter_tensors(trained).values()):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
            tensor.copy_(0.3 * noise.to(torch.bfloat16))
    route = saved(folder, WIDTHS, Route(attention_skip=[2]))
    save_adapter(trained, route, folder / "adapter.safetensors")
    reference = adapter_ref(folder / "adapter.safetensors", folder, 2, 4, TARGETS)
    return RoutedModel(model, route, {"mlp_keep": layers, "adapter": trained}), route.model_copy(
        update={"adapter": reference}
    )


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_adapter_sits_on_narrow_mlps(tmp_path: Path, family: str, folded: bool) -> None:
    model = copy.deepcopy(tiny_model(0, family))
    trained, route = adapted(model, tmp_path)
    down = trained.slim_layers[1].mlp.down_proj  # type: ignore[union-attr]
    assert down.lora_A["default"].in_features == 9  # type: ignore[union-attr,index]
    assert route.adapter is not None
    route = route.model_copy(update={"adapter": route.adapter.model_copy(update={"folded": folded})})
    loaded = load_routed(copy.deepcopy(tiny_model(0, family)), route, tmp_path)
    close(logits(loaded, slim=True), logits(trained, slim=True))
    assert not torch.allclose(logits(narrowed(model, WIDTHS), slim=True), logits(trained, slim=True), atol=1e-2)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_packed_narrow_mlps_say_the_same(tmp_path: Path, family: str) -> None:
    model = copy.deepcopy(tiny_model(0, family))
    _, route = adapted(model, tmp_path)
    routed = load_routed(model, route, tmp_path, "packed")
    said = [logits(routed, slim=slim) for slim in (True, False)]
    prepare((model, *routed.slim_networks), "packed", routed.device, routed.dtype)
    assert not [module for module in routed.slim_layers.modules() if type(module) is nn.Linear]
    for slim, before in zip((True, False), said, strict=True):
        close(logits(routed, slim=slim), before)
    with pytest.raises(ModelError, match="load it anew"):
        load_routed(model, saved(tmp_path, WIDTHS), tmp_path)
    with pytest.raises(ModelError, match=r"_proj is a .*cannot be put into order; load the verifier anew"):
        narrow_layers(model.get_decoder().layers, {1: kept(9, seed=5)})


def test_the_compiled_backend_runs_narrow_mlps() -> None:
    model = copy.deepcopy(tiny_model())
    layers = narrow_layers(model.get_decoder().layers, WIDTHS)
    compiled = CompiledModel(model, held={"mlp_keep": layers}, compiler=lambda run: run)
    close(logits(compiled, slim=True), logits(RoutedModel(model, held={"mlp_keep": layers}), slim=True))
    assert compiled.slim_sublayers is not compiled.full_sublayers


def test_a_route_without_its_neurons_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="widths of MLPs, but not their neurons; open it with load_routed"):
        RoutedModel(tiny_model(), saved(tmp_path, WIDTHS))


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"1": order_of(0)}, "is of layers 1, route.mlp_keep names others"),
        ({"1": order_of(0), "2": order_of(0)}, "is of layers 1, 2, route.mlp_keep names others"),
        ({"1": order_of(0), "3": order_of(0)[1:]}, "layer 3 must name neurons 0 to 31 once each"),
        ({"1": order_of(0), "3": order_of(0).clamp(max=30)}, "layer 3 must name neurons 0 to 31 once each"),
        ({"1": order_of(0), "3": order_of(0) + 1}, "layer 3 must name neurons 0 to 31 once each"),
        ({"1": order_of(0).float(), "3": order_of(0)}, "layer 1 must name neurons 0 to 31 once each"),
        ({"1": order_of(0)[None], "3": order_of(0)}, "layer 1 must name neurons 0 to 31 once each"),
    ],
    ids=["one missing", "other layers", "too few", "twice", "beyond", "no integers", "another shape"],
)
def test_foreign_orders_are_refused(tmp_path: Path, tensors: dict[str, Tensor], complaint: str) -> None:
    route = saved(tmp_path, WIDTHS)
    save_file(tensors, tmp_path / "slim" / "widths.safetensors")
    with pytest.raises(SpecError, match=rf"widths\.safetensors.*{complaint}.*export the spec again"):
        MlpKeep().load(route, tmp_path, SIZES)


@pytest.mark.parametrize("size", [0, 20])
def test_a_damaged_file_is_refused(tmp_path: Path, size: int) -> None:
    route = saved(tmp_path, WIDTHS)
    path = tmp_path / "slim" / "widths.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SpecError, match="cannot be read as orders of neurons"):
        MlpKeep().load(route, tmp_path, SIZES)


@pytest.mark.parametrize("keep", [NEURONS, NEURONS + 1])
def test_no_fewer_neurons_than_there_are_is_refused(tmp_path: Path, keep: int) -> None:
    route = saved(tmp_path, {1: kept(keep)})
    with pytest.raises(SpecError, match=rf"keeps {keep} neurons of layer 1, .* 32; give 1 to 31, or leave the layer"):
        MlpKeep().load(route, tmp_path, SIZES)
