"""Tiny models written to disk, as transformers and llama.cpp write them."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf

from tests.tiny.models import VOCAB, tiny_model
from tests.tiny.tokenizers import CHAT_TEMPLATE, EOS, SPECIAL, tiny_tokenizer

TinyFolder = Path


def save_tiny(
    folder: Path, seed: int = 0, family: str = "llama", *, vocab: int = VOCAB, eos: int | None = EOS
) -> TinyFolder:
    """Write a tiny model and its tokenizer as ``save_pretrained`` does."""
    model = copy.deepcopy(tiny_model(seed, family, vocab=vocab))
    model.config.eos_token_id = eos
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


def write_gguf(path: Path, seed: int = 0) -> Path:
    """``tiny_model(seed)`` with a byte-level tokenizer, as llama.cpp would write it."""
    model = tiny_model(seed)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, "Ġ", "w", *map(str, range(8)), *(f"w{digit}" for digit in range(8))])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges([f"w {digit}" for digit in range(8)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        weight = tensor.float()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the rotary halves of a head
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(gguf_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives to a weight of a Llama."""
    layers = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    found = layers.get_name(name, try_suffixes=(".weight",))
    assert found is not None
    return str(found)
