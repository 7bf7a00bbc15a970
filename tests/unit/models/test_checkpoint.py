"""Weights one by one: what is read is what was saved, and what is missing or damaged is told in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.offload_cases import save_verifier
from tests.tiny import tiny_model
from viasd_calib.errors import ModelError
from viasd_calib.models import load_verifier
from viasd_calib.models.checkpoint import Checkpoint
from viasd_calib.models.offloaded import layer_weights

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files."""
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="8kB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
    return tmp_path / "shards"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return save_verifier(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_reads_what_was_saved(sharded: Path, dtype: torch.dtype) -> None:
    state = tiny_model().state_dict()
    found = Checkpoint(str(sharded)).read({name: weight.shape for name, weight in state.items()}, dtype)
    assert found.keys() == state.keys()
    for name, weight in state.items():
        assert torch.equal(found[name], weight.to(dtype))


def test_a_decoder_that_was_saved_alone(tmp_path: Path) -> None:
    """Its names lack what those of a whole model begin with."""
    tiny_model().model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert checkpoint.has("model.norm.weight")
    assert not checkpoint.has("lm_head.weight")
    (found,) = checkpoint.read({"model.norm.weight": [16]}, torch.float32).values()
    assert torch.equal(found, tiny_model().model.norm.weight)


def test_a_missing_weight_and_a_wrong_shape(sharded: Path) -> None:
    checkpoint = Checkpoint(str(sharded))
    with pytest.raises(ValueError, match=r"its weights are incomplete, model\.norm\.bias is missing"):
        checkpoint.read({"model.norm.bias": [16]}, torch.float32)
    with pytest.raises(ValueError, match=r"its weight model\.norm\.weight has the shape \[16\], not \[17\]"):
        checkpoint.read({"model.norm.weight": [17]}, torch.float32)


def test_files_are_closed(sharded: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files cannot be counted here")
    state = tiny_model().state_dict()
    checkpoint = Checkpoint(str(sharded))
    checkpoint.read({name: weight.shape for name, weight in state.items()}, torch.float32)
    opened = [os.path.realpath(Path("/proc/self/fd") / one) for one in os.listdir("/proc/self/fd")]
    assert not [one for one in opened if one.startswith(str(sharded))]


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Save some weights otherwise, or leave them out."""
    state = {name: weight.clone() for name, weight in load_file(path).items()}
    for name, weight in changes.items():
        del state[name]
        if weight is not None:
            state[name] = weight
    save_file(state, path, {"format": "pt"})


HEAD, UP = "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "model.safetensors", **{name: None})


def halved(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "model.safetensors", **{name: torch.ones(3, 64)})


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without(HEAD), "its weights are incomplete, lm_head.weight is missing; give a hub id, a folder"),
        (without(UP), f"its weights are incomplete, {UP} is missing; give a hub id, a folder"),
        (halved(HEAD), r"its weight lm_head.weight has the shape \[3, 64\], not \[24, 64\]; give a hub id, a folder"),
        (truncated, ".*; give a hub id, a folder"),
        (pickled, "it has no safetensors files on this machine; download it, or save it as safetensors"),
        (quantised, "its weights are quantised by a library, and cannot be read layer by layer; load a plain one"),
    ],
    ids=["no head", "no layer weight", "wrong shape", "truncated", "pickled", "quantised"],
)
def test_damage_is_told_in_one_line(whole: Path, fault: Callable[[Path], None], message: str) -> None:
    fault(whole)
    with pytest.raises(ModelError, match=f"cannot load the model '{whole}': {message}") as found:
        load_verifier(str(whole), layers=False)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (halved(UP), rf"its weight {UP} has the shape \[3, 64\], not \[96, 64\]; download it again"),
        (truncated, ".*; download it again, or save it again"),
        (without(UP), ".*; download it again, or save it again"),
    ],
    ids=["wrong shape", "truncated", "missing"],
)
def test_damage_after_loading_is_told_in_one_line(whole: Path, fault: Callable[[Path], None], message: str) -> None:
    """A layer's weights are read late: what has become of the file by then is told, too."""
    weights = layer_weights(load_verifier(str(whole), layers=False).model)
    assert weights is not None
    # The weights that are in memory are mapped: the damaged file takes the place of the old one, as any writer does it.
    path = whole / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    fault(whole)
    with pytest.raises(ModelError, match=f"cannot read the layers of the model '{whole}': {message}") as found:
        weights.keep([one.weight for one in weights.linears])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("damage", ["shard", "list", "empty list", "truncated shard"])
def test_damaged_shards(sharded: Path, damage: str) -> None:
    shard, index = min(sharded.glob("*-of-*")), sharded / "model.safetensors.index.json"
    if damage == "shard":
        shard.unlink()
        with pytest.raises(ValueError, match=f"the file {shard.name} is missing; download it again"):
            Checkpoint(str(sharded))
    elif damage == "truncated shard":
        os.truncate(shard, 100)
        with pytest.raises(SafetensorError):
            Checkpoint(str(sharded)).read({"model.embed_tokens.weight": [24, 16]}, torch.float32)
    else:
        index.write_text("{" if damage == "list" else "{}", encoding="utf-8")
        with pytest.raises(ValueError, match=f"its file {index.name} is damaged; download it again"):
            Checkpoint(str(sharded))


def test_a_missing_shard_is_told_in_one_line(sharded: Path) -> None:
    min(sharded.glob("*-of-*")).unlink()
    with pytest.raises(ModelError, match=r"cannot load the model .*-of-.*safetensors is missing; download it again"):
        load_verifier(str(sharded), layers=False)
