"""Bridges: which runs they stand in for, what they compute, and that a spec brings them back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tests.rounding import assert_near
from tests.tiny import LAYERS, TINY_FAMILIES, random_bridges, tiny_model
from viasd_calib.errors import SpecError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.onednn_linear import OneDNNLinear, pack_linears
from viasd_calib.slim.parts.base import Sizes, load_parts
from viasd_calib.slim.parts.bridges import Bridge, Bridges, bridges_ref, save_bridges
from viasd_calib.slim.parts.skips import SkippedRun, skipped_runs
from viasd_calib.spec import Route

SIZES = Sizes.of_config(tiny_model().config)
ROUTE = Route(attention_skip=[1, 2], mlp_skip=[1])
HIDDEN = 16


layers = st.sets(st.integers(0, 7)).map(sorted)


@given(layers, layers)
def test_runs_are_what_is_skipped_and_do_not_touch(attention: list[int], mlp: list[int]) -> None:
    runs = skipped_runs(Route(attention_skip=attention, mlp_skip=mlp))
    covered = [number for run in runs for number in range(run.begin, run.end)]
    assert covered == sorted([2 * layer for layer in attention] + [2 * layer + 1 for layer in mlp])
    assert all(one.end < other.begin for one, other in pairwise(runs))
    assert len({run.name for run in runs}) == len(runs)


@torch.inference_mode()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_bridge_adds_its_map_in_place_of_the_run(family: str) -> None:
    model, bridges = tiny_model(0, family), random_bridges(ROUTE)
    routed = RoutedModel(model, ROUTE, {"bridges": bridges})
    assert [(one.kind, one.index) for one in routed.slim_sublayers[2:4]] == [("bridge", 1), ("mlp", 2)]
    ids = torch.tensor([[5, 1, 7]])
    window = CacheWindow(routed.new_cache(3), 0, 3, 3)
    hidden = routed.embed(ids)
    inputs = routed.attention_inputs(hidden, window.positions(), window.mask, window)
    for sublayer in routed.full_sublayers:
        number = 2 * sublayer.index + (sublayer.kind == "mlp")
        if number == 2:
            bridge = bridges["attention_1"]
            assert isinstance(bridge, Bridge)
            hidden = hidden + bridge.up(hidden)
        if not 2 <= number < 5:
            hidden = hidden + routed.step(sublayer, hidden, inputs)
    assert_near(routed.slim(ids, window).last, routed.final_norm(hidden))


@torch.inference_mode()
def test_the_full_verifier_and_runs_without_a_bridge_stay_as_they_are() -> None:
    model = tiny_model()
    route = Route(attention_skip=[1], mlp_skip=[2])
    only_one = nn.ModuleDict({"mlp_2": random_bridges(route)["mlp_2"]})
    routed = RoutedModel(model, route, {"bridges": only_one})
    assert [one.kind for one in routed.slim_sublayers].count("bridge") == 1
    assert all(one.kind != "bridge" for one in routed.full_sublayers)


@torch.inference_mode()
def test_taps_inside_a_run_see_what_the_bridge_gives() -> None:
    bridges = random_bridges(Route(attention_skip=[1, 2], mlp_skip=[1, 2]))
    routed = RoutedModel(tiny_model(), Route(attention_skip=[1, 2], mlp_skip=[1, 2]), {"bridges": bridges})
    tapped = routed.slim(torch.tensor([[5]]), CacheWindow(routed.new_cache(1), 0, 1, 1), (1, 2, 3, LAYERS)).tapped
    before, inside, after, _ = tapped[0, 0]
    assert_near(after, before + bridges["attention_1"](before))
    assert torch.equal(inside, after)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_what_is_saved_is_what_is_loaded(rank: int | None, carry: bool, tmp_path: Path) -> None:
    path, bridges = tmp_path / "bridges.safetensors", random_bridges(ROUTE, rank, carry)
    save_bridges(bridges, path)
    route = ROUTE.model_copy(update={"bridges": bridges_ref(path, tmp_path, rank, carry)})
    loaded = Bridges().load(route, tmp_path, SIZES)
    expected = bridges.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_route_without_bridges_reads_no_file() -> None:
    assert load_parts(ROUTE, Path("nowhere"), SIZES) == {}


@pytest.mark.parametrize("harm", ["missing", "foreign", "shape", "damaged"])
def test_tensors_that_do_not_fit_are_refused(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "bridges.safetensors"
    save_bridges(random_bridges(ROUTE), path)
    tensors = load_file(path)
    match harm:
        case "missing":
            del tensors["attention_1.up.bias"]
        case "foreign":
            tensors["attention_9.up.bias"] = torch.zeros(HIDDEN)
        case "shape":
            tensors["attention_1.up.bias"] = torch.zeros(HIDDEN + 1)
    save_file(tensors, path)
    if harm == "damaged":
        path.write_bytes(path.read_bytes()[:20])
    route = ROUTE.model_copy(update={"bridges": bridges_ref(path, tmp_path, None)})
    with pytest.raises(SpecError, match="export the spec again"):
        Bridges().load(route, tmp_path, SIZES)


def test_bridges_are_packed_with_the_rest() -> None:
    bridges = random_bridges(ROUTE)
    expected = bridges["attention_1"](torch.ones(1, HIDDEN))
    pack_linears(RoutedModel(tiny_model(), ROUTE, {"bridges": bridges}).slim_networks)
    bridge = bridges["attention_1"]
    assert isinstance(bridge, Bridge)
    assert isinstance(bridge.up, OneDNNLinear)
    assert_near(bridge(torch.ones(1, HIDDEN)), expected)


def test_a_run_is_named_by_its_first_sublayer() -> None:
    assert [SkippedRun(begin, begin + 1).name for begin in (0, 3)] == ["attention_0", "mlp_1"]
