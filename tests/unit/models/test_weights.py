from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import TinyFolder, save_tiny, tiny_model, tiny_tokenizer, verifier_ref, write_gguf
from viasd_calib.choices import SMOLLM2
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.errors import WeightsWarning
from viasd_calib.models import SMOLLM2_SHA256, load_verifier, weights_in_memory, weights_sha256
from viasd_calib.spec import (
    Certificate,
    Decoding,
    Gates,
    PromptLookupDraft,
    Route,
    RoutingSpec,
    VerifierRef,
    check_weights,
    file_sha256,
    save_spec,
)

ONE, OTHER = "1" * 64, "2" * 64


def certificate() -> Certificate:
    return Certificate(
        bound=0.05, confidence=0.95, procedure="x", candidates_tested=1, n_prompts=200, max_new_tokens=32,
        split_sha256={}, observed=0.0, p_value=0.01,
    )  # fmt: skip


def spec_for(ref: VerifierRef, audit: str) -> RoutingSpec:
    return RoutingSpec(
        verifier=ref,
        draft=PromptLookupDraft(),
        route=Route(attention_skip=[1], mlp_skip=[2]),
        gates=Gates(convention="ratio", accept_at=0.3, escalate_below=0.1),
        decoding=Decoding.model_validate({"audit": audit}),
        certificate=certificate(),
    )


def test_the_hash_sees_every_weight_and_no_place(tmp_path: Path) -> None:
    one, same, other = (save_tiny(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 5)))
    assert weights_sha256(str(one)) == weights_sha256(str(same)) == load_verifier(str(one)).ref.weights_sha256
    assert weights_sha256(str(one)) != weights_sha256(str(other))
    assert load_verifier(str(one), dtype="bfloat16").ref.weights == load_verifier(str(one)).ref.weights


def test_the_hash_is_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    """safetensors before pickled ones; shards by their index; nothing else that lies in the folder."""
    model = copy.deepcopy(tiny_model())
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="8KB")
    tiny_tokenizer().save_pretrained(sharded)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = weights_sha256(str(sharded))
    (sharded / "pytorch_model.bin").write_bytes(b"not looked at")
    (sharded / "training_args.bin").write_bytes(b"not looked at")
    assert weights_sha256(str(sharded)) == before == load_verifier(str(sharded)).ref.weights
    tensors = load_file(shards[-1])
    name, tensor = next(iter(tensors.items()))
    save_file({**tensors, name: tensor + 1}, shards[-1], metadata={"format": "pt"})
    assert weights_sha256(str(sharded)) != before


def test_pickled_weights_have_a_hash(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_verifier(str(folder)).ref.weights == weights_sha256(str(folder)) is not None


def test_no_files_no_hash(tmp_path: Path) -> None:
    assert weights_sha256(str(tmp_path)) is None
    assert weights_sha256("nobody/nothing-here") is None
    assert weights_sha256(str(tmp_path / "none.gguf")) is None


def test_a_gguf_file_is_one_by_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path, its converted folder, and a copy of that folder; not one whose weights were changed since."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf")
    digest = file_sha256(path)
    assert load_verifier(str(path)).ref.weights_sha256 == digest
    folder = tmp_path / "cache" / "viasd_calib" / "gguf" / digest
    assert load_verifier(str(folder)).ref.weights == digest
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert load_verifier(str(copied)).ref.weights == digest
    weights = copied / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert load_verifier(str(copied)).ref.weights == weights_sha256(str(copied)) != digest
    (folder / "gguf_source.json").unlink()  # as earlier releases left it
    assert weights_sha256(str(folder)) == digest


def test_a_spec_of_an_earlier_release_names_the_hash_of_its_gguf_file() -> None:
    assert verifier_ref(revision=f"sha256:{ONE}").weights == ONE
    assert verifier_ref(revision="main").weights is None
    assert weights_sha256(SMOLLM2) == SMOLLM2_SHA256


@pytest.mark.parametrize("found", [OTHER, None])
def test_other_weights_void_a_certificate(found: str | None) -> None:
    spec = spec_for(verifier_ref(weights_sha256=ONE), "off")
    with pytest.warns(WeightsWarning, match=r"certificate is void, and audit off becomes strict; .*calibrate"):
        held = check_weights(spec, verifier_ref(weights_sha256=found))
    assert held.decoding == spec.decoding.model_copy(update={"audit": "strict"})
    assert held.certified_bound is None
    assert held.certificate is not None
    assert "the spec was made for" in held.certificate.note
    assert RoutingSpec.model_validate(held.model_dump()) == held
    assert spec.certified_bound == 0.05


@pytest.mark.parametrize("found", [OTHER, None])
def test_exact_decoding_goes_on_with_a_warning(found: str | None) -> None:
    spec = spec_for(verifier_ref(weights_sha256=ONE), "strict")
    with pytest.warns(WeightsWarning, match="texts stay exact"):
        held = check_weights(spec, verifier_ref(weights_sha256=found))
    assert held.certified_bound is None, "the user's own audit is not certified either"


def test_the_weights_it_was_made_for_are_welcome() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for audit in ("strict", "off"):
            spec = spec_for(verifier_ref(weights_sha256=ONE), audit)
            assert check_weights(spec, verifier_ref(weights_sha256=ONE, name_or_path="elsewhere")) is spec
        old = spec_for(verifier_ref(revision=f"sha256:{ONE}"), "off")
        assert check_weights(old, verifier_ref(weights_sha256=ONE)) is old
        nameless = spec_for(verifier_ref(), "strict")
        assert check_weights(nameless, verifier_ref(weights_sha256=ONE)) is nameless


def test_a_lossy_spec_that_names_no_weights_says_so() -> None:
    spec = spec_for(verifier_ref(), "off")
    with pytest.warns(WeightsWarning, match="does not say which weights"):
        assert check_weights(spec, verifier_ref(weights_sha256=ONE)) is spec


def test_an_engine_with_other_weights_decodes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: TinyFolder
) -> None:
    tuned, path = save_tiny(tmp_path / "tuned", seed=5), tmp_path / "routing.json"
    save_spec(spec_for(load_verifier(str(tiny_folder)).ref, "off"), path)
    with pytest.warns(WeightsWarning, match=str(tuned)):
        engine = load_engine(path, verifier=str(tuned))
    expected = engine.decoder("autoregressive").generate([7, 8, 9], 12).tokens
    assert engine.decoder().generate([7, 8, 9], 12).tokens == expected
    capsys.readouterr()
    words = ["generate", "--spec", str(path), "--prompt", "w1", "--max-new-tokens", "2", "--verifier", str(tuned)]
    assert main(words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "notice" in line]
    assert len(said) == 1
    assert said[0].startswith(f"notice: the weights of {tuned} (SHA-256 ")


def test_a_model_in_memory_has_the_weights_of_its_files_until_they_change(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert weights_in_memory(model) == weights_sha256(str(folder)) is not None
    weight = model.model.layers[1].mlp.up_proj.weight
    before = weight.data[0, 0].clone()
    weight.data[0, 0] += 1
    assert weights_in_memory(model) is None
    weight.data[0, 0] = before
    assert weights_in_memory(model) is not None
    (folder / "model.safetensors").unlink()
    assert weights_in_memory(model) is None


def test_a_model_made_in_memory_has_no_hash() -> None:
    assert weights_in_memory(copy.deepcopy(tiny_model())) is None


def test_an_index_is_read(tmp_path: Path) -> None:
    copy.deepcopy(tiny_model()).save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(set(index["weight_map"].values())) > 1
    assert weights_in_memory(model) == weights_sha256(str(tmp_path)) is not None
