from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny import LAYERS, TINY_FAMILIES, small_disk, tiny_model
from viasd_calib.errors import SpecError, StorageError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_routed
from viasd_calib.slim.parts.adapter import (
    DEFAULT_TARGETS,
    adapted_layers,
    adapter_ref,
    adapter_tensors,
    save_adapter,
)
from viasd_calib.slim.parts.base import Sizes, load_parts
from viasd_calib.spec import AdapterKind, AdapterRef, Route

TARGETS = ["q_proj", "v_proj", "down_proj"]
ROUTE = Route(attention_skip=[1], mlp_skip=[2])
TEXT = torch.tensor([[5, 1, 17, 3, 3, 9, 20]])


def make_adapter(seed: int | None = 0, alpha: int = 4) -> nn.ModuleList:
    """An adapter on the tiny verifier, trained as far as ``seed`` says; None leaves it as it begins."""
    layers = adapted_layers(tiny_model().get_decoder().layers, 2, alpha, TARGETS)
    generator = torch.Generator().manual_seed(seed or 0)
    if seed is not None:
        with torch.no_grad():
            for tensor in adapter_tensors(layers).values():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator).to(torch.bfloat16))
    return layers.eval()


@torch.inference_mode()
def states(routed: RoutedModel, *, slim: bool) -> Tensor:
    width = TEXT.shape[1]
    window = CacheWindow(routed.new_cache(width), 0, width, width)
    return (routed.slim if slim else routed.full)(TEXT, window).last


def saved(folder: Path, route: Route = ROUTE, seed: int = 0, alpha: int = 4) -> Route:
    """Save a trained adapter in ``folder``; the route that names it."""
    path = folder / "adapter.safetensors"
    save_adapter(make_adapter(seed, alpha), route, path)
    return route.model_copy(update={"adapter": adapter_ref(path, folder, 2, alpha, TARGETS)})


def test_the_verifiers_parameters_are_shared() -> None:
    layers = tiny_model().get_decoder().layers
    ours = {name.replace(".base_layer", ""): p for name, p in make_adapter().named_parameters() if "lora_" not in name}
    theirs = dict(layers.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)


def test_the_verifiers_own_layers_are_not_touched() -> None:
    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    before = states(RoutedModel(model), slim=False)
    adapter = make_adapter()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(states(RoutedModel(model), slim=False), before)
    assert torch.equal(states(RoutedModel(model, Route(), {"adapter": adapter}), slim=False), before)


def test_only_the_adapter_learns() -> None:
    learning = {name for name, parameter in make_adapter(None).named_parameters() if parameter.requires_grad}
    assert learning == set(adapter_tensors(make_adapter(None)))
    assert len(learning) == 2 * LAYERS * len(TARGETS)


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny_model()
    plain = states(RoutedModel(model, ROUTE), slim=True)
    assert torch.equal(states(RoutedModel(model, ROUTE, {"adapter": make_adapter(None)}), slim=True), plain)


def test_a_trained_adapter_changes_the_slim_path_alone() -> None:
    model = tiny_model()
    adapted, plain = RoutedModel(model, ROUTE, {"adapter": make_adapter()}), RoutedModel(model, ROUTE)
    assert not torch.allclose(states(adapted, slim=True), states(plain, slim=True), atol=1e-2)
    assert torch.equal(states(adapted, slim=False), states(plain, slim=False))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    layers = load_routed(tiny_model(), saved(tmp_path), tmp_path).slim_layers
    assert layers is not None
    assert not any(parameter.requires_grad for parameter in layers.parameters())
    assert not layers.training
    expected = states(RoutedModel(tiny_model(), ROUTE, {"adapter": make_adapter()}), slim=True)
    assert torch.equal(states(RoutedModel(tiny_model(), ROUTE, {"adapter": layers}), slim=True), expected)


@pytest.mark.parametrize("alpha", [1, 3])
def test_the_adapters_scale_is_kept(tmp_path: Path, alpha: int) -> None:
    layers = load_routed(tiny_model(), saved(tmp_path, alpha=alpha), tmp_path).slim_layers
    expected = states(RoutedModel(tiny_model(), ROUTE, {"adapter": make_adapter(alpha=alpha)}), slim=True)
    torch.testing.assert_close(states(RoutedModel(tiny_model(), ROUTE, {"adapter": layers}), slim=True), expected)


def test_loaded_layers_share_the_verifiers_parameters_and_run_without_peft(tmp_path: Path) -> None:
    layers = load_routed(tiny_model(), saved(tmp_path), tmp_path).slim_layers
    assert layers is not None
    theirs = {id(parameter) for parameter in tiny_model().get_decoder().layers.parameters()}
    own = [name for name, parameter in layers.named_parameters() if id(parameter) not in theirs]
    assert len(own) == 2 * (LAYERS * len(TARGETS) - 3)  # of the sublayers that run
    assert not [module for module in layers.modules() if type(module).__module__.startswith("peft")]


def test_a_folded_adapter_says_the_same_in_copies_of_what_it_sits_on(tmp_path: Path) -> None:
    route = saved(tmp_path, alpha=3)
    assert route.adapter is not None
    folded = route.model_copy(update={"adapter": route.adapter.model_copy(update={"folded": True})})
    plain, layers = (load_routed(tiny_model(), one, tmp_path).slim_layers for one in (route, folded))
    assert layers is not None
    expected = states(RoutedModel(tiny_model(), ROUTE, {"adapter": plain}), slim=True)
    torch.testing.assert_close(states(RoutedModel(tiny_model(), ROUTE, {"adapter": layers}), slim=True), expected)
    theirs = {id(parameter) for parameter in tiny_model().get_decoder().layers.parameters()}
    own = {name for name, parameter in layers.named_parameters() if id(parameter) not in theirs}
    assert len(own) == LAYERS * len(TARGETS) - 3
    assert all(name.split(".")[2] in TARGETS for name in own)


def of_kind(kind: AdapterKind, family: str) -> nn.ModuleList:
    """An adapter of any kind on a tiny verifier, as it begins."""
    return adapted_layers(tiny_model(family=family).get_decoder().layers, *shape_of(kind), kind).eval()


def shape_of(kind: AdapterKind) -> tuple[int | None, int | None, Sequence[str]]:
    """Rank, alpha and targets of a small adapter."""
    rank, alpha = (None, None) if kind == "norms" else (2, 4)
    return rank, alpha, DEFAULT_TARGETS[kind]


@pytest.mark.parametrize("kind", get_args(AdapterKind))
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_adapters_of_all_kinds_say_what_peft_says(tmp_path: Path, kind: AdapterKind, family: str) -> None:
    """As they begin they change nothing; trained, saved and loaded they run without peft, and leave q as it was."""
    model = tiny_model(family=family)
    plain, before = states(RoutedModel(model, ROUTE), slim=True), states(RoutedModel(model), slim=False)
    trained = of_kind(kind, family)
    torch.testing.assert_close(states(RoutedModel(model, ROUTE, {"adapter": trained}), slim=True), plain)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(trained).values():
            tensor.copy_((tensor + 0.1 * torch.randn(tensor.shape, generator=draw)).to(torch.bfloat16))
    said = states(RoutedModel(model, ROUTE, {"adapter": trained}), slim=True)
    assert not torch.allclose(said, plain, atol=1e-2)

    path = tmp_path / "adapter.safetensors"
    save_adapter(trained, ROUTE, path)
    adapter = adapter_ref(path, tmp_path, *shape_of(kind), kind=kind, folded=kind == "dora")
    layers = load_routed(model, ROUTE.model_copy(update={"adapter": adapter}), tmp_path).slim_layers
    assert layers is not None
    assert not [module for module in layers.modules() if type(module).__module__.startswith("peft")]
    torch.testing.assert_close(
        states(RoutedModel(model, ROUTE, {"adapter": layers}), slim=True), said, atol=1e-4, rtol=1e-4
    )
    assert torch.equal(states(RoutedModel(model), slim=False), before)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"kind": "norms", "rank": 2, "alpha": 4}, "norms has no rank"),
        ({"kind": "norms", "folded": True}, "not folded"),
        ({"kind": "dora", "rank": 2, "alpha": 4}, "set folded to true"),
        ({"kind": "lora", "alpha": 4}, "needs rank and alpha"),
    ],
)
def test_entries_that_do_not_fit_the_kind_are_refused(entries: dict[str, Any], words: str) -> None:
    tensors = {"path": "adapter.safetensors", "sha256": "0" * 64}
    with pytest.raises(ValidationError, match=words):
        AdapterRef.model_validate({"targets": ["q_proj"], "tensors": tensors, **entries})


def test_skipped_sublayers_are_not_stored(tmp_path: Path) -> None:
    saved(tmp_path)
    names = load_file(tmp_path / "adapter.safetensors").keys()
    assert not [name for name in names if name.startswith(("1.self_attn", "2.mlp"))]
    assert len(names) == 2 * (LAYERS * len(TARGETS) - 3)


def test_a_route_without_an_adapter_runs_the_verifiers_layers() -> None:
    assert load_parts(ROUTE, Path("nowhere"), Sizes.of_config(tiny_model().config)) == {}


def test_targets_that_do_not_exist_are_refused() -> None:
    with pytest.raises(SpecError, match=r"\['c_attn'\] name no module"):
        adapted_layers(tiny_model().get_decoder().layers, 2, 4, ["c_attn"])


def rewrite(path: Path, changes: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


NAME = "0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    "changes",
    [
        {"9.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 16)},
        {NAME: torch.ones(2, 17)},
        {NAME: None},
    ],
    ids=["unknown name", "other shape", "one missing"],
)
def test_foreign_tensors_are_refused(tmp_path: Path, changes: dict[str, Tensor | None]) -> None:
    route = saved(tmp_path)
    rewrite(tmp_path / "adapter.safetensors", changes)
    with pytest.raises(SpecError, match=rf"{next(iter(changes))}.*export the spec again"):
        load_routed(tiny_model(), route, tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    route = saved(tmp_path)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SpecError, match="cannot be read as adapter tensors"):
        load_routed(tiny_model(), route, tmp_path)
    path.unlink()
    with pytest.raises(SpecError, match="cannot be read as adapter tensors"):
        load_routed(tiny_model(), route, tmp_path)


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter.safetensors"
    old = path.read_bytes()
    with pytest.raises(StorageError, match=r"adapter\.safetensors"), small_disk(500):
        save_adapter(make_adapter(1), ROUTE, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
