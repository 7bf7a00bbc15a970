"""Which sublayers are cold: within the memory that is allowed, and what q' runs never."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.tiny import LAYERS, make_model, tiny_config
from viasd_calib.errors import ModelError
from viasd_calib.models.offloaded import LayerWeights
from viasd_calib.slim.offload.layer_files import PAGE
from viasd_calib.slim.offload.residency import KINDS, _spread, choose_residency, cold_sublayers, sublayer_bytes
from viasd_calib.spec import AdapterRef, LowBitWeights, MlpWidths, Route, TensorFile

FILE = TensorFile(path="some.safetensors", sha256="a" * 64)
some_layers = st.sets(st.integers(0, LAYERS - 1)).map(sorted)


def opened() -> tuple[LayerWeights, list[nn.Module]]:
    torch.manual_seed(0)
    model = make_model(tiny_config(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=32))
    return LayerWeights(model, lambda _: {}), [*model.model.layers]


@given(attention=some_layers, mlp=some_layers, low=some_layers, memory=st.none() | st.integers(0, 900_000))
def test_bounds_are_kept(attention: list[int], mlp: list[int], low: list[int], memory: int | None) -> None:
    """All bytes are counted once, two of the largest sublayers fit beside them, and no more layer would have fitted."""
    weights, layers = opened()
    rounded = {
        "attention": {"8": [n for n in low if n not in attention]},
        "mlp": {"4": [n for n in low if n not in mlp]},
    }
    bits = {kind: by_bits for kind, by_bits in rounded.items() if all(by_bits.values())}
    low_bit = LowBitWeights.model_validate(bits) if bits else None
    route = Route(attention_skip=attention, mlp_skip=mlp, low_bit=low_bit)
    possible = cold_sublayers(route, LAYERS)
    others, every = 5000, sum(one.weight.nbytes for one in weights.linears)
    sizes = {layer: sublayer_bytes(layers[layer], kinds) for layer, kinds in possible.items()}
    longest = [sublayer_bytes(layers[layer], [kind]) for layer, kinds in possible.items() for kind in kinds]
    buffers = min(2, len(longest)) * (max(longest, default=0) + PAGE)
    needed = others + every - sum(sizes.values()) + buffers
    if not possible:
        with pytest.raises(ModelError, match="leave out --offload"):
            choose_residency(weights, layers, route, others, memory)
        return
    if memory is not None and memory < min(needed, others + every):
        with pytest.raises(ModelError, match=f"takes {needed:,} bytes, and --memory allows {memory:,}"):
            choose_residency(weights, layers, route, others, memory)
        return
    found = choose_residency(weights, layers, route, others, memory)
    assert found.cold_bytes == sum(sizes[layer] for layer in found.cold)
    assert {layer: possible[layer] for layer in found.cold} == dict(found.cold)
    if memory is None:
        assert dict(found.cold) == possible
        assert found.resident_bytes == needed
        return
    assert found.resident_bytes <= memory
    assert found.resident_bytes + found.cold_bytes == others + every + (buffers if found.cold else 0)
    if len(found.cold) > 1:
        assert found.resident_bytes + min(sizes[layer] for layer in found.cold) > memory


def test_the_parts_of_q_that_slim_parts_read_are_never_cold() -> None:
    everything = [*range(4)]
    low_bit = LowBitWeights(attention={"8": everything}, mlp={"8": everything})
    first = LowBitWeights(attention={"8": [0]}, mlp={"8": [0]})
    adapter = AdapterRef(rank=4, alpha=8.0, targets=["q_proj"], tensors=FILE)
    assert cold_sublayers(Route(low_bit=first, adapter=adapter, mlp_skip=[3]), 4) == {3: ["mlp"]}
    narrow = Route(low_bit=low_bit, mlp_keep=MlpWidths(keep={1: 20}, tensors=FILE))
    assert cold_sublayers(narrow, 4) == {n: [kind for kind in KINDS if (n, kind) != (1, "mlp")] for n in everything}
    assert cold_sublayers(Route(), 4) == {}
    norms = AdapterRef(kind="norms", targets=["input_layernorm"], tensors=FILE)
    assert cold_sublayers(Route(low_bit=low_bit, adapter=norms), 4) == {n: [*KINDS] for n in everything}


ADAPTER = AdapterRef(rank=4, alpha=8.0, targets=["q_proj"], tensors=FILE)
EVERY = [*range(LAYERS)]
WIDTHS = MlpWidths(keep=dict.fromkeys(EVERY, 20), tensors=FILE)
LOW_MLPS = LowBitWeights(mlp={"8": EVERY})


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (Route(), "runs all of the full one's own sublayers"),
        (Route(low_bit=LowBitWeights(head=4)), "give a spec whose route has sublayers in low bits or skips some"),
        (Route(low_bit=LOW_MLPS, adapter=ADAPTER), "the route has an adapter on all that it has in low bits"),
        (Route(low_bit=LOW_MLPS, mlp_keep=WIDTHS), "the route has narrow MLPs on all that it has in low bits"),
    ],
)
def test_a_route_that_leaves_nothing_cold_says_which_part_keeps_it(route: Route, words: str) -> None:
    with pytest.raises(ModelError, match=f"{words}.*leave out --offload"):
        choose_residency(*opened(), route, 0, None)


@given(st.integers(0, 40))
def test_spread_orders_every_layer_once(count: int) -> None:
    assert sorted(_spread(range(count))) == [*range(count)]


def test_the_first_resident_layers_are_far_apart() -> None:
    assert sorted(_spread(range(8))[:3]) == [2, 4, 6]
