"""Verifiers without the memory of their layers: everything else is as it is loaded, and zeros are never used."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.offload_cases import save_verifier, write_spec
from tests.tiny import TINY_FAMILIES
from viasd_calib.errors import ModelError
from viasd_calib.models import load_verifier
from viasd_calib.models.offloaded import (
    LayerWeights,
    is_without_memory,
    layer_linears,
    layer_weights,
    layers_in_memory,
    load_by_accelerate,
    refuse_without_layers,
    without_memory,
)
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.plan import share_parameters
from viasd_calib.spec import LowBitWeights, Route

pytestmark = pytest.mark.usefixtures("empty_cache")


def both(folder: Path) -> tuple[nn.Module, nn.Module, LayerWeights]:
    """A verifier's model, the same without its layers, and what reads these."""
    without = load_verifier(str(folder), layers=False).model
    weights = layer_weights(without)
    assert weights is not None
    return load_verifier(str(folder)).model, without, weights


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_all_but_the_layers_is_as_it_is_loaded(tmp_path: Path, family: str) -> None:
    folder = save_verifier(tmp_path / "q", family)
    loaded, without = load_verifier(str(folder)), load_verifier(str(folder), layers=False)
    assert without.ref == loaded.ref
    assert without.eos_ids == loaded.eos_ids
    assert without.model.config._attn_implementation == loaded.model.config._attn_implementation
    assert without.model.generation_config.to_dict() == loaded.model.generation_config.to_dict()
    assert not without.model.training
    inside = {id(one.weight) for one in layer_linears(without.model.get_decoder().layers)}
    wanted, found = dict(loaded.model.named_parameters()), dict(without.model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert is_without_memory(weight) == (id(weight) in inside)
        assert (weight.shape, weight.dtype) == (wanted[name].shape, wanted[name].dtype)
        assert not weight.requires_grad
        if id(weight) not in inside:
            assert torch.equal(weight, wanted[name])
    for (name, buffer), (other, kept) in zip(without.model.named_buffers(), loaded.model.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, kept)


def without_embeddings(path: Path) -> None:
    state = load_file(path)
    del state["model.embed_tokens.weight"]
    save_file(state, path, {"format": "pt"})


def with_equal_ones(path: Path) -> None:
    state = load_file(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("change", [None, without_embeddings, with_equal_ones], ids=["both", "head alone", "equal"])
def test_embeddings_are_tied_as_transformers_ties_them(tmp_path: Path, change: Callable[[Path], None] | None) -> None:
    """A configuration that asks for it, and a file with both, other or equal, or with the head alone."""
    folder = save_verifier(tmp_path / "q")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}), encoding="utf-8")
    if change is not None:
        change(folder / "model.safetensors")
    loaded, without, _ = both(folder)
    heads = [(one.get_input_embeddings().weight, one.lm_head.weight) for one in (loaded, without)]  # type: ignore[operator, union-attr]
    for found, wanted in zip(heads[1], heads[0], strict=True):
        assert torch.equal(found, wanted)
    assert (heads[1][0] is heads[1][1]) == (heads[0][0] is heads[0][1]) == (change is not None)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_layers_that_are_kept_make_it_whole(tmp_path: Path, family: str) -> None:
    loaded, without, weights = both(save_verifier(tmp_path / "q", family))
    weights.keep([one.weight for one in weights.linears])
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    assert torch.equal(without(ids).logits, loaded(ids).logits)
    without.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    saved, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path / "q"))
    assert saved.keys() == first.keys()
    assert all(torch.equal(weight, first[name]) for name, weight in saved.items())


def test_weights_come_into_memory_for_a_block(tmp_path: Path) -> None:
    loaded, without, weights = both(save_verifier(tmp_path / "q"))
    some = [one.weight for one in weights.linears[:3]]
    kept = [one.weight for one in layer_linears(loaded.get_decoder().layers)[:3]]  # type: ignore[operator]
    weights.keep(some[:1])
    with layers_in_memory(without, some):
        assert all(torch.equal(*two) for two in zip(some, kept, strict=True))
    assert [is_without_memory(one) for one in some] == [False, True, True]
    assert torch.equal(some[0], kept[0])
    with pytest.raises(ValueError, match="inside"), layers_in_memory(without, some):
        raise ValueError("inside")
    assert [is_without_memory(one) for one in some] == [False, True, True]
    with layers_in_memory(loaded, kept):
        assert not any(is_without_memory(one) for one in kept)


def test_zeros_are_not_calculated_with(tmp_path: Path) -> None:
    """By the model, by a routed model, and by copies of its layers."""
    _, without, weights = both(save_verifier(tmp_path / "q"))
    message = "loaded without its layers, and runs only in an engine that reads them: give load_engine an Offload"
    with pytest.raises(ModelError, match=message):
        without(torch.tensor([[7, 8]]))
    routed = RoutedModel(without)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message):
        routed.full(torch.tensor([[7, 8]]), routed.new_cache(2).rows()[0].window(0, 2))
    with pytest.raises(ModelError, match=message):
        share_parameters(routed.layers[1]).mlp(torch.ones(1, 64))  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        refuse_without_layers([without])
    weights.keep([one.weight for one in weights.linears])
    refuse_without_layers([without])


def test_zeros_are_not_saved(tmp_path: Path) -> None:
    _, without, weights = both(save_verifier(tmp_path / "q"))
    weights.keep([one.weight for one in weights.linears[1:]])  # one is left
    message = "loaded without its layers cannot be saved; load it with them, and save that"
    with pytest.raises(ModelError, match=message):
        without.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert not [*(tmp_path / "saved").glob("*.safetensors")]
    with pytest.raises(ModelError, match=message):
        without.state_dict()
    with pytest.raises(ModelError, match=message):
        share_parameters(without.get_decoder().layers[0]).state_dict()  # type: ignore[operator]


def test_it_is_not_copied(tmp_path: Path) -> None:
    """A copy would ask for weights by the identity of those that it was copied from."""
    _, without, _ = both(save_verifier(tmp_path / "q"))
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ModelError, match="was loaded without its layers, and cannot be copied; load another"):
            duplicate(without)  # type: ignore[operator]


def test_moving_fills_nothing(tmp_path: Path) -> None:
    """``Module.to`` would make whole tensors of weights without memory on another device."""
    _, without, weights = both(save_verifier(tmp_path / "q"))
    weights.move(torch.device("cpu"))
    without.to("cpu")
    assert all(is_without_memory(one.weight) for one in weights.linears)
    elsewhere = without_memory(torch.ones(3, 4), torch.device("meta"))
    assert (elsewhere.device.type, elsewhere.shape, is_without_memory(elsewhere)) == ("meta", (3, 4), True)


def test_nothing_is_read_once_it_is_released(tmp_path: Path) -> None:
    _, _, weights = both(save_verifier(tmp_path / "q"))
    weights.release()
    assert weights.linears == []


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    base = save_verifier(tmp_path / "q")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 4, "lora_alpha": 8}),
        encoding="utf-8",
    )
    (folder / "adapter_model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"is an adapter.*merge it into the model and save that, or leave out"):
        load_verifier(str(folder), layers=False)


WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
WIDE |= {"head_dim": 64, "layers": 16, "initializer_range": 0.02}
COUNT = """
import gc, sys, torch
from pathlib import Path
from viasd_calib import load_engine, load_verifier
from viasd_calib.slim.offload.settings import Offload

def now(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

folder, way = sys.argv[1:]
load_verifier(folder, layers=False)  # libraries are loaded, and files' hashes known
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
before = now("VmRSS")
offload = None if way == "plain" else Offload()
engine = load_engine(Path(folder) / "routing.json", dtype="bfloat16", backend="eager", offload=offload)
engine.decoder("autoregressive").generate([7, 8, 9], max_new_tokens=2)
print(now("VmHWM") - before, 0 if offload is None else engine.routed.cold.residency.cold_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory cannot be counted here")
def test_loading_never_holds_the_whole_model(tmp_path: Path) -> None:
    """The peak of a load that converts, and of one that does not, is below that of a plain one by 60 % of cold bytes.

    A whole copy of q anywhere on the way would leave no difference at all. Of the cold bytes, two buffers of the
    largest of 32 sublayers are 9 %, and one sublayer that is read, packed into a file and rounded in float32 for q'
    takes up to 20 % for a moment; the rest of the 40 % is room for pages that the kernel counts late.
    """
    folder = save_verifier(tmp_path / "q", dtype=torch.bfloat16, **WIDE)
    write_spec(folder, Route(low_bit=LowBitWeights(attention={"8": [*range(16)]}, mlp={"8": [*range(16)]})))
    found = {}
    for way in ("plain", "converting", "converted"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", COUNT, str(folder), way], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found[way] = [int(word) for word in done.stdout.split()[-2:]]
    plain = found["plain"][0]
    for way in ("converting", "converted"):
        peak, cold = found[way]
        assert cold > 100_000_000
        assert peak < plain - 0.6 * cold, found


def test_accelerate_writes_under_the_hash_of_the_weights(tmp_path: Path, empty_cache: Path) -> None:
    """One folder for each model, and not one for each run."""
    folders = [save_verifier(tmp_path / family, family) for family in ("llama", "qwen2")]
    hashes = []
    for folder in [*folders, folders[0]]:
        loaded = load_verifier(str(folder))
        hashes.append(f"{loaded.ref.weights_sha256}-float32")
        ids = torch.tensor([[7, 8, 9]])
        read = load_by_accelerate(str(folder), torch.float32, torch.device("cpu"))
        assert torch.equal(read(ids).logits, loaded.model(ids).logits)
    assert {path.name for path in (empty_cache / "accelerate").iterdir()} == set(hashes)
    assert len(set(hashes)) == 2
