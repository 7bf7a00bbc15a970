"""Packed weights: the same products, one copy of each weight."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.tiny import TINY_FAMILIES, tiny_model
from viasd_calib.errors import ModelError
from viasd_calib.slim.adapter import adapted_layers
from viasd_calib.slim.backends import default_backend, prepare
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.packed import PackedLinear, can_pack, pack_linears
from viasd_calib.spec import Route

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this PyTorch has no oneDNN")


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
    assert linears(packed.model, PackedLinear)
    torch.testing.assert_close(full_logits(packed, ids), expected, rtol=1e-4, atol=1e-4)


def test_slim_layers_share_the_packed_weights() -> None:
    """q' with an adapter reads the very tensors that q reads; the adapter's own weights are packed too."""
    model = copy.deepcopy(tiny_model())
    slim = adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj", "up_proj"])
    pack_linears([model, slim])
    own = {id(layer._weight) for layer in linears(model, PackedLinear)}  # type: ignore[attr-defined]
    ours = {id(layer._weight) for layer in linears(slim, PackedLinear)}  # type: ignore[attr-defined]
    adapters = 2 * 2 * len(slim)
    assert len(ours & own) == 7 * len(slim)
    assert len(ours - own) == adapters


def test_plain_weights_are_freed() -> None:
    """Nothing holds a plain weight once it is packed: the model takes the memory of one copy."""
    layer = nn.Sequential(nn.Linear(8, 8))
    weight = weakref.ref(layer[0].weight)
    pack_linears([layer])
    gc.collect()
    assert weight() is None


def test_weight_can_be_read_back() -> None:
    """Rows of the head can be taken from a packed layer."""
    linear = nn.Linear(5, 9)
    rows = linear.weight.detach().clone()
    holder = nn.ModuleList([linear])
    pack_linears([holder])
    assert torch.equal(holder[0].weight, rows)


def test_subclasses_are_left_alone() -> None:
    """What derives from a linear layer may compute something else."""

    class Doubling(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    holder = nn.ModuleList([Doubling(2, 2)])
    pack_linears([holder])
    assert type(holder[0]) is Doubling


def test_backends() -> None:
    """bfloat16 on a CPU is packed by default; packing elsewhere is refused by name."""
    assert default_backend(torch.device("cpu"), torch.bfloat16) == "packed"
    assert default_backend(torch.device("cuda"), torch.bfloat16) == "eager"
    layer = nn.ModuleList([nn.Linear(2, 2)])
    prepare([layer], "eager", torch.device("cpu"))
    assert type(layer[0]) is nn.Linear
    with pytest.raises(ModelError, match="backend packed needs a CPU"):
        prepare([layer], "packed", torch.device("cuda"))


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
