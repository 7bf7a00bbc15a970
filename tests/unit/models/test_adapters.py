from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.packing import skip_where_not_packed
from tests.tiny import TinyFolder, save_tiny, tiny_spec, tiny_tokenizer, transformers_text
from viasd_calib.decoding.engine import load_engine
from viasd_calib.errors import ModelError, WeightsWarning
from viasd_calib.models import load_verifier, weights_sha256

PROMPT = [7, 8, 9]


def save_lora(base: TinyFolder, folder: Path, seed: int = 0, **settings: Any) -> Path:
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> TinyFolder:
    return save_tiny(tmp_path / "base", eos=None)


@pytest.fixture
def lora(base: TinyFolder, tmp_path: Path) -> Path:
    folder = save_lora(base, tmp_path / "lora")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "packed"])
def test_an_adapter_decodes_as_the_adapted_model(
    base: TinyFolder, lora: Path, tmp_path: Path, dtype: Any, backend: Any
) -> None:
    skip_where_not_packed(backend, dtype)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
    before = transformers_text(plain, PROMPT, 16, [])
    merged = PeftModel.from_pretrained(plain, str(lora)).merge_and_unload()
    expected = transformers_text(merged, PROMPT, 16, [])
    spec = tiny_spec(base, tmp_path)
    with pytest.warns(WeightsWarning, match="texts stay exact"):
        engine = load_engine(spec, verifier=str(lora), dtype=dtype, backend=backend)
    assert engine.decoder("autoregressive").generate(PROMPT, 16).tokens == expected != before
    assert engine.decoder("three_tier").generate(PROMPT, 16).tokens == expected


def test_nothing_of_the_adapter_is_left_in_the_model(lora: Path) -> None:
    model = load_verifier(str(lora)).model
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert {type(module) for name, module in model.named_modules() if name.endswith("proj")} == {torch.nn.Linear}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_base_and_adapter_weights_count_and_their_places_do_not(base: TinyFolder, lora: Path, tmp_path: Path) -> None:
    found = load_verifier(str(lora)).ref.weights
    assert found == weights_sha256(str(lora)) != weights_sha256(str(base))
    moved = tmp_path / "moved"
    config = json.loads((lora / "adapter_config.json").read_text())
    base.rename(moved)
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(moved)}))
    assert weights_sha256(str(lora)) == found
    assert weights_sha256(str(save_lora(moved, tmp_path / "other", seed=1))) != found
    (lora / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(moved), "lora_alpha": 99})
    )
    assert weights_sha256(str(lora)) != found
    (lora / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(save_tiny(tmp_path / "fifth", seed=5))})
    )
    assert weights_sha256(str(lora)) != found


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(base: TinyFolder, tmp_path: Path) -> None:
    ref = load_verifier(str(save_lora(base, tmp_path / "bare"))).ref
    assert ref.tokenizer_sha256 == load_verifier(str(base)).ref.tokenizer_sha256


def _drop(lora: Path) -> None:
    weights = load_file(lora / "adapter_model.safetensors")
    save_file(dict([*weights.items()][1:]), lora / "adapter_model.safetensors")


def _config(lora: Path, **changes: Any) -> None:
    path = lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, "lacks weights"),
        (lambda lora: (lora / "adapter_config.json").write_text("{"), r"adapter_config\.json is damaged"),
        (lambda lora: _config(lora, base_model_name_or_path=None), "names no base model"),
        (lambda lora: _config(lora, base_model_name_or_path="/nowhere/at/all"), "cannot load the model"),
        (lambda lora: (lora / "config.json").write_text("{}"), "holds a whole model and an adapter: remove"),
        (lambda lora: (lora / "adapter_model.safetensors").write_bytes(b"x"), "cannot load the model"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(lora: Path, spoil: Any, message: str) -> None:
    spoil(lora)
    with pytest.raises(ModelError, match=message) as caught:
        load_verifier(str(lora))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_prompts_is_refused(base: TinyFolder, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ModelError, match="of type PROMPT_TUNING, which cannot be merged into a model; give a LoRA"):
        load_verifier(str(tmp_path / "prompts"))
