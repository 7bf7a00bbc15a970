"""Hashes of tensor files, configurations and tokenizers; whatever differs from its hash is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.tiny import LAYERS, full_spec, small_document, small_spec, verifier_ref, write_document
from viasd_calib.errors import SpecError
from viasd_calib.spec import (
    TensorFile,
    check_verifier,
    config_sha256,
    file_sha256,
    load_spec,
    save_spec,
    tensor_files,
    tokenizer_sha256,
)

HASH = "0123456789abcdef" * 4


def test_a_spec_with_all_its_parts_is_loaded_with_its_tensors(tmp_path: Path) -> None:
    spec = full_spec(tmp_path)
    save_spec(spec, tmp_path / "routing.json")
    assert load_spec(str(tmp_path / "routing.json")) == spec
    assert [file.path for file in tensor_files(spec)] == [
        "draft.safetensors",
        "slim/widths.safetensors",
        "slim/bridges.safetensors",
        "slim/head.safetensors",
        "slim/adapter.safetensors",
    ]


@pytest.mark.parametrize(
    "name", ["draft.safetensors", "slim/adapter.safetensors", "slim/head.safetensors", "slim/widths.safetensors"]
)
def test_foreign_and_missing_tensors_are_refused(tmp_path: Path, name: str) -> None:
    save_spec(full_spec(tmp_path), tmp_path / "routing.json")
    (tmp_path / name).write_bytes(b"another")
    with pytest.raises(SpecError, match=rf"{name} is not the tensor file"):
        load_spec(tmp_path / "routing.json")
    (tmp_path / name).unlink()
    with pytest.raises(SpecError, match=rf"{name} is missing"):
        load_spec(tmp_path / "routing.json")


@pytest.mark.parametrize("path", ["/etc/passwd", "../draft", "a/../../draft", "..", "a\\..\\b"])
def test_tensors_outside_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValidationError, match="inside the spec's folder"):
        TensorFile(path=path, sha256=HASH)
    document = small_document()
    document["draft"] = {
        "kind": "shallow",
        "num_layers": 1,
        "head_vocab": 2,
        "taps": [1],
        "tensors": {"path": path, "sha256": HASH},
    }
    with pytest.raises(SpecError, match="inside the spec's folder"):
        load_spec(write_document(tmp_path / "routing.json", document))


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, HASH.upper()])
def test_a_hash_that_is_none_is_refused(digest: str) -> None:
    with pytest.raises(ValidationError):
        TensorFile(path="a", sha256=digest)


def test_the_verifier_it_was_made_for_is_welcome() -> None:
    check_verifier(small_spec(), verifier_ref(name_or_path="elsewhere", revision="r", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", "Qwen2ForCausalLM"),
        ("num_layers", LAYERS + 1),
        ("hidden_size", 32),
        ("vocab_size", 25),
        ("config_sha256", "c" * 64),
        ("tokenizer_sha256", "c" * 64),
    ],
)
def test_another_verifier_is_refused(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"{name} .*this verifier is other .*{value}"):
        check_verifier(small_spec(), verifier_ref(name_or_path="other", **{name: value}))


def test_the_hash_of_a_tokenizer_sees_words_ids_and_template() -> None:
    words = {"a": 0, "b": 1}
    assert tokenizer_sha256(words, "t") == tokenizer_sha256({"b": 1, "a": 0}, "t")
    others = [({"a": 0, "c": 1}, "t"), ({"a": 1, "b": 0}, "t"), ({"a": 0}, "t"), (words, "u"), (words, None)]
    assert tokenizer_sha256(words, "t") not in {tokenizer_sha256(*other) for other in others}


def test_the_hash_of_a_configuration_sees_what_is_computed() -> None:
    config = {"hidden_size": 8, "rope_theta": 1e4}
    assert config_sha256(config) == config_sha256({"rope_theta": 1e4, "hidden_size": 8, "_name_or_path": "x"})
    assert config_sha256(config) != config_sha256({**config, "rope_theta": 1e5})
    assert config_sha256(config) != config_sha256({**config, "rms_norm_eps": 1e-5})


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
