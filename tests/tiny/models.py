"""Tiny random models of every family, made once for each set of arguments: a test that changes one copies it first."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 24
LAYERS = 4

SLIDING = 3
"""Positions that a sliding layer of a tiny model reads: fewer than most texts of the tests have."""
_WINDOW: dict[str, Any] = {"sliding_window": SLIDING}
_GEMMA: dict[str, Any] = {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 6, "tie_word_embeddings": True}
_PHI: dict[str, Any] = {"head_dim": 8, "resid_pdrop": 0.5}
_TURN = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}

TINY_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral_sliding": (MistralConfig, {**_WINDOW, "head_dim": 8}),
    "qwen2": (Qwen2Config, {}),
    "qwen2_sliding": (Qwen2Config, {**_WINDOW, "use_sliding_window": True}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3_sliding": (Qwen3Config, {**_WINDOW, "use_sliding_window": True, "head_dim": 8}),
    "gemma2": (Gemma2Config, {**_GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}),
    "gemma3_text": (Gemma3TextConfig, {**_GEMMA, "final_logit_softcapping": 4.0}),
    "phi3": (Phi3Config, {**_PHI, "rope_parameters": _TURN}),
    "phi3_sliding": (Phi3Config, {**_PHI, **_WINDOW, "tie_word_embeddings": True}),
}
"""Tiny models by name, with what sets each apart from a Llama."""


def tiny_config(family: str = "llama", *, layers: int = LAYERS, vocab: int = VOCAB, **changes: Any) -> PreTrainedConfig:
    """Configuration of a tiny model; wide initial weights, so that the most probable token varies."""
    kind, of_family = TINY_FAMILIES[family]
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.35,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind not in (LlamaConfig, MistralConfig, Phi3Config):  # these have no types
        slides = of_family.get("sliding_window") is not None
        kinds = ["sliding_attention", "full_attention"] if slides else ["full_attention"]
        common["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    return kind(**{**common, **of_family, **changes})


def longrope_config(context: int) -> PreTrainedConfig:
    """A Phi-3 that turns positions otherwise once a text is longer than ``context``."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": context,
    }
    return tiny_config("phi3", head_dim=4, original_max_position_embeddings=context, rope_parameters=longrope)


def make_model(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """A random model; its norms and biases differ too, which transformers begins all alike."""
    if getattr(config, "attn_logit_softcapping", None):
        attention = attention or "eager"  # what earlier transformers choose leaves the caps out
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.eval().requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape)
    return model


@functools.cache
def tiny_model(seed: int = 0, family: str = "llama", *, layers: int = LAYERS, vocab: int = VOCAB) -> PreTrainedModel:
    """A tiny random model; the same arguments give the same object."""
    torch.manual_seed(seed)
    config = tiny_config(family, layers=layers, vocab=vocab)
    return make_model(config)


@functools.cache
def noisy_copy(seed: int = 0, family: str = "llama", noise: float = 0.05) -> PreTrainedModel:
    """``tiny_model(seed)`` with its weights disturbed: a draft model that is right part of the time."""
    model = copy.deepcopy(tiny_model(seed, family))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return model


@functools.cache
def wide_model(seed: int = 0, family: str = "llama", noise: float = 0.0, *, layers: int = LAYERS) -> PreTrainedModel:
    """``tiny_model``, or ``noisy_copy``, with the same weights in float64.

    Two forwards of other shapes, or on another processor, may add up in another order. In float32 their logits then
    differ by about 1e-6, and one token in some ten thousand is nearer to a tie, or to a gate's bound, than that: so no
    text is sure to be the same twice. In float64 they differ by 1e-15, and round to the same float32 that
    the rules read. Whatever compares whole texts decodes such a model.
    """
    model = noisy_copy(seed, family, noise) if noise else tiny_model(seed, family, layers=layers)
    return copy.deepcopy(model).double()


def spoil(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose last norm is not a number, so that its logits are not either."""
    broken = copy.deepcopy(model)
    broken.get_decoder().norm.weight.fill_(float("nan"))
    return broken
