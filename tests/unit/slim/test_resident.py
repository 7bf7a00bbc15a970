"""Bytes in memory: those that are counted are those that tensors take."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.offload_cases import cold, engine, save_verifier, with_adapter, with_bridges, write_spec
from viasd_calib.slim.low_bit import Bits, LowBitLinear, round_weight
from viasd_calib.slim.low_bit_kernel import packed_codes
from viasd_calib.slim.native.packing import pack_bfloat16, pack_rounded
from viasd_calib.slim.offload.layer_files import PAGE
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.parts.mlp_keep import KeptNeurons, save_widths
from viasd_calib.slim.resident import low_bit_bytes, slim_bytes
from viasd_calib.spec import LowBitWeights, Route

NEURONS = 96
SHAPES = [(64, 64), (17, 70), (576, 1536)]


def with_narrow_mlp(folder: Path, route: Route, layer: int) -> Route:
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(5))
    entry = save_widths({layer: KeptNeurons(order, 40)}, folder / "mlp_keep.safetensors", folder)
    return route.model_copy(update={"mlp_keep": entry})


def every_part(folder: Path, folded: bool) -> Route:
    """A route with a bridge, an adapter, low bits of both kinds and a narrow MLP."""
    low_bit = LowBitWeights(attention={"8": [0, 2]}, mlp={"4": [2]}, head=8)
    route = Route(attention_skip=[1], mlp_skip=[1], low_bit=low_bit)
    route = with_bridges(folder, with_adapter(folder, route, "lora", folded, products=["q_proj", "v_proj"]))
    return with_narrow_mlp(folder, route, 3)


def alive() -> list[Tensor]:
    """Every tensor of this process whose values are in memory, and none of those that a trace has without values."""
    gc.collect()
    plain = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    return [one for one in plain if one.layout == torch.strided and one.device.type == "cpu"]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by place: of an expanded tensor what is there of it, of several views of one storage that storage."""
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.mark.parametrize("folded", [False, True], ids=["beside", "folded"])
@pytest.mark.usefixtures("empty_cache")
def test_what_is_counted_is_what_tensors_take(tmp_path: Path, folded: bool) -> None:
    """In float32, where bridges and adapters take twice what 16 bits would.

    Buffers, and files of codes that are kept as they are read (one each of an MLP and the head), end with a page.
    """
    folder = save_verifier(tmp_path / "q", "qwen2")
    spec = write_spec(folder, every_part(folder, folded))
    engine(spec, Offload())  # what is made once a process is there afterwards
    before = alive()  # held, so that no new tensor takes the place of an old one
    found = engine(spec, Offload())
    after, streamed = storages(alive()), cold(found)
    taken = sum(after[place] for place in after.keys() - storages(before).keys())
    assert streamed.residency.cold == {1: ["attention", "mlp"]}
    assert taken == pytest.approx(streamed.residency.resident_bytes, abs=2 * PAGE)
    assert streamed.slim_bytes > found.routed.memory.bytes + 2 * PAGE, "the bound tells one count from the other"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_low_bits_take_what_they_are_held_in(shape: tuple[int, int], bits: Bits) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=False)
    rounded = round_weight(linear.weight, bits)
    layer = LowBitLinear(linear, bits, 16, rounded)
    held = [one for one in vars(layer).values() if isinstance(one, Tensor)]
    assert low_bit_bytes(*shape, bits, "torch") == sum(one.nbytes for one in held)
    assert all(torch.equal(one, other) for one, other in zip(layer.rounded[1:], rounded[1:], strict=True))
    packed = pack_rounded(rounded)
    assert low_bit_bytes(*shape, bits, "native") == sum(one.nbytes for one in packed[2:])
    of_a_gpu = [packed_codes(rounded), rounded.steps, rounded.lowest]
    assert low_bit_bytes(*shape, bits, "triton") == sum(one.nbytes for one in of_a_gpu)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_weights_are_filled_up_by_native_kernels(shape: tuple[int, int]) -> None:
    full = nn.Linear(3, 3).bfloat16()
    own = nn.Linear(shape[1], shape[0], bias=False).bfloat16()
    assert slim_bytes(full, [full, own], "native", "native") == pack_bfloat16(own.weight).tiles.nbytes
    assert slim_bytes(full, [full, own], "eager", "torch") == own.weight.nbytes


def test_a_view_takes_memory_where_it_is_packed_alone() -> None:
    full = nn.Linear(64, 64, bias=False)
    narrow = nn.Linear(64, 32, bias=False)
    narrow.weight = nn.Parameter(full.weight.detach()[:32])
    assert slim_bytes(full, [narrow], "eager", "torch") == 0
    assert slim_bytes(full, [narrow], "packed", "torch") == 32 * 64 * 4
