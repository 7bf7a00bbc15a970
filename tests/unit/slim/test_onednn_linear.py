"""Packed weights: the same products, one copy of each weight."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.rounding import assert_near
from tests.tiny import TINY_FAMILIES, tiny_model
from viasd_calib.errors import ModelError
from viasd_calib.slim.backends import default_backend, prepare
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.fused_linear import FusedLinearPart
from viasd_calib.slim.loading import load_routed
from viasd_calib.slim.onednn_linear import OneDNNLinear, can_pack, pack_linears
from viasd_calib.slim.parts.adapter import adapted_layers, adapter_ref, save_adapter
from viasd_calib.spec import Route

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")


def linears(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Every module of exactly ``kind`` inside ``module``."""
    return [found for found in module.modules() if type(found) is kind]


@torch.inference_mode()
def full_logits(model: RoutedModel, ids: torch.Tensor) -> torch.Tensor:
    """q's logits over a whole text."""
    window = CacheWindow(model.new_cache(ids.shape[1]), 0, ids.shape[1], ids.shape[1])
    return model.logits(model.full(ids, window).last)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_packed_model_says_the_same(family: str) -> None:
    """Every family's logits stay what they were, up to rounding, and no plain linear layer is left."""
    plain = RoutedModel(tiny_model(family=family))
    ids = torch.randint(3, plain.config.vocab_size, (1, 7))
    expected = full_logits(plain, ids)
    packed = RoutedModel(copy.deepcopy(tiny_model(family=family)))
    pack_linears([packed.model])
    assert not linears(packed.model, nn.Linear)
    assert linears(packed.model, OneDNNLinear)
    torch.testing.assert_close(full_logits(packed, ids), expected, rtol=1e-4, atol=1e-4)


def packed_weights(module: nn.Module) -> set[int]:
    """Identities of the packed weights that the layers inside ``module`` read."""
    alone = {id(layer.weight) for layer in linears(module, OneDNNLinear)}
    return alone | {id(layer.product.linear.weight) for layer in linears(module, FusedLinearPart)}  # type: ignore[union-attr]


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["k_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_slim_layers_share_the_packed_weights(targets: list[str]) -> None:
    """q' with an adapter reads the very tensors that q reads; the adapter's own weights are packed too."""
    model = copy.deepcopy(tiny_model())
    slim = adapted_layers(model.get_decoder().layers, 2, 4, targets)
    pack_linears([model, slim])
    own, ours = packed_weights(model), packed_weights(slim)
    adapters = 2 * len(targets) * len(slim)
    assert len(ours & own) == 4 * len(slim)  # queries, keys and values; output; gate and up; down
    assert len(ours - own) == adapters


def test_loaded_slim_layers_are_packed(tmp_path: Path) -> None:
    """As they are deployed: one copy of q's weights, adapters that read the same input in one product."""
    model = copy.deepcopy(tiny_model())
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    trained = adapted_layers(model.get_decoder().layers, 2, 4, targets)
    for name, tensor in trained.state_dict().items():
        if "lora_B" in name:
            nn.init.normal_(tensor)
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained, Route(), path)
    slim = load_routed(model, Route(adapter=adapter_ref(path, tmp_path, 2, 4, targets)), tmp_path).slim_layers
    assert slim is not None
    ids = torch.randint(3, 20, (1, 5))
    said = []
    for pack in (False, True):
        if pack:
            pack_linears([model, slim])
        routed = RoutedModel(model, Route(), {"adapter": slim})
        with torch.inference_mode():
            said.append(routed.slim(ids, CacheWindow(routed.new_cache(5), 0, 5, 5)).last)
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)
    assert not linears(slim, nn.Linear)
    own, ours = packed_weights(model), packed_weights(slim)
    assert len(ours & own) == 4 * len(slim)
    assert len(ours - own) == (len(targets) + 3) * len(slim)  # down: three products, up: one each


class Attention(nn.Module):
    """Layers of the names that attention modules give them, each with a bias or without."""

    def __init__(self, biases: Sequence[bool]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(8, out, bias=bias) for out, bias in zip((8, 4, 4), biases, strict=True)
        )


@given(
    biases=st.lists(st.booleans(), min_size=3, max_size=3),
    order=st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj"]), min_size=1, max_size=6),
    width=st.integers(1, 5),
)
@torch.inference_mode()
def test_joint_layers_say_what_they_said_apart(biases: list[bool], order: list[str], width: int) -> None:
    """Called in any order, by themselves or again, with biases of all, some or none."""
    plain = Attention(biases)
    packed = copy.deepcopy(plain)
    pack_linears([packed])
    assert len(linears(packed, FusedLinearPart)) == 3
    inputs = torch.randn(2, width, 8)
    for name in order:
        said, expected = (getattr(module, name)(inputs) for module in (packed, plain))
        assert_near(said, expected)


def test_layers_of_one_weight_are_not_joined() -> None:
    """Keys that are values too: two names of one layer."""
    holder = Attention([True, True, True])
    holder.v_proj = holder.k_proj
    pack_linears([holder])
    assert len({id(layer) for layer in linears(holder, OneDNNLinear)}) == 2


def test_a_weight_that_others_hold_keeps_its_values() -> None:
    """Packing changes the modules it is given, and nobody else's."""
    holder = Attention([False, False, False])
    weight = holder.k_proj.weight
    values = weight.detach().clone()
    pack_linears([holder])
    assert torch.equal(weight, values)


def test_plain_weights_are_freed() -> None:
    """Nothing holds a plain weight once it is packed: the model takes the memory of one copy."""
    holder = nn.ModuleList([nn.Linear(8, 8), Attention([True, False, False])])
    weights = [weakref.ref(layer.weight) for layer in linears(holder, nn.Linear)]
    pack_linears([holder])
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4


def test_weight_can_be_read_back() -> None:
    """Rows of the head can be taken from a packed layer."""
    linear = nn.Linear(5, 9)
    rows = linear.weight.detach().clone()
    holder = nn.ModuleList([linear])
    pack_linears([holder])
    assert torch.equal(holder[0].plain(), rows)
    assert (holder[0].weight.dtype, holder[0].weight.device) == (rows.dtype, rows.device)


def test_subclasses_are_left_alone() -> None:
    """What derives from a linear layer may compute something else."""

    class Doubling(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    holder = nn.ModuleList([Doubling(2, 2)])
    pack_linears([holder])
    assert type(holder[0]) is Doubling


def test_backends() -> None:
    """float32 is never packed by default; packing elsewhere than on a CPU is refused by name."""
    assert default_backend(torch.device("cpu"), torch.float32) == "eager"
    assert default_backend(torch.device("cuda"), torch.bfloat16) == "eager"
    layer = nn.ModuleList([nn.Linear(2, 2)])
    prepare([layer], "eager", torch.device("cpu"), torch.float32)
    assert type(layer[0]) is nn.Linear
    with pytest.raises(ModelError, match="backend packed needs a CPU"):
        prepare([layer], "packed", torch.device("cuda"), torch.float32)


def test_slim_pass_of_packed_model_is_that_of_the_plain_one() -> None:
    """q' under a route, after packing."""
    route = Route(attention_skip=[1], mlp_skip=[2])
    ids = torch.randint(3, 20, (1, 5))
    said = []
    for pack in (False, True):
        model = RoutedModel(copy.deepcopy(tiny_model()), route)
        if pack:
            pack_linears([model.model])
        with torch.inference_mode():
            window = CacheWindow(model.new_cache(5), 0, 5, 5)
            said.append(model.logits(model.slim(ids, window).last))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


def test_a_cpu_without_the_number_format_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's bfloat16 kernels ask for instructions that not every CPU has."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    cpu = torch.device("cpu")
    assert not can_pack(cpu, torch.bfloat16)
    with pytest.raises(ModelError, match=r"calculates in torch\.bfloat16.*choose backend eager"):
        prepare([], "packed", cpu, torch.bfloat16)


def test_a_packed_adapter_says_what_it_said_and_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """q' through packed LoRA layers; peft asks for the type of their weights at each call, which must cost nothing."""
    model = copy.deepcopy(tiny_model())
    slim = adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj", "up_proj"])
    for name, tensor in slim.state_dict().items():
        if "lora_B" in name:
            nn.init.normal_(tensor)
    ids = torch.randint(3, 20, (1, 5))
    said = []
    for pack in (False, True):
        if pack:
            pack_linears([model, slim])
            monkeypatch.setattr(OneDNNLinear, "plain", lambda _: pytest.fail("a weight was unpacked"))
        routed = RoutedModel(model, Route(), {"adapter": slim})
        with torch.inference_mode():
            window = CacheWindow(routed.new_cache(5), 0, 5, 5)
            said.append(routed.logits(routed.slim(ids, window).last))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


def test_rows_of_a_packed_head_can_be_read() -> None:
    model = RoutedModel(copy.deepcopy(tiny_model()))
    rows = model.head_rows(torch.tensor([4, 2])).clone()
    pack_linears([model.model])
    assert torch.equal(model.head_rows(torch.tensor([4, 2])), rows)


@torch.inference_mode()
@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
def test_a_folded_adapter_makes_a_product_of_its_own(tmp_path: Path) -> None:
    """q's keys stand beside q''s folded queries and values in one product: they would else take q's whole product."""
    model = copy.deepcopy(tiny_model())
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj", "v_proj"]), Route(), path)
    reference = adapter_ref(path, tmp_path, 2, 4, ["q_proj", "v_proj"], folded=True)
    slim = load_routed(model, Route(adapter=reference), tmp_path).slim_layers
    assert slim is not None
    pack_linears([model, slim])
    (own, full) = (layers[0].self_attn for layers in (slim, model.get_decoder().layers))
    assert own.q_proj.product is own.k_proj.product is own.v_proj.product
    assert full.q_proj.product is full.k_proj.product is full.v_proj.product
    assert own.k_proj.product is not full.k_proj.product
    assert slim[0].mlp.gate_proj.product is model.get_decoder().layers[0].mlp.gate_proj.product
    hidden = torch.randn(1, 3, 16)
    assert_near(own.k_proj(hidden), full.k_proj(hidden))


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
def test_an_adapter_for_a_packed_verifier_is_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model())
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj"]), Route(), path)
    pack_linears([model])
    with pytest.raises(ModelError, match="load it anew"):
        load_routed(model, Route(adapter=adapter_ref(path, tmp_path, 2, 4, ["q_proj"])), tmp_path)
