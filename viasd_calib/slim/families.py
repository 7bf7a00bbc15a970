"""What a family of models looks like from inside: its sublayers, called on the model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from viasd_calib.errors import ModelError


class KeyValueStore(Protocol):
    """What an attention module of transformers asks of a cache."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values of ``layer``; return those to attend to."""
        ...


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention sublayers of one forward have in common."""

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    store: KeyValueStore


@dataclass(frozen=True)
class Family:
    """How to run one attention and one MLP sublayer; each returns what is added to the residual stream."""

    attention: Callable[[nn.Module, Tensor, AttentionInputs], Tensor]
    mlp: Callable[[nn.Module, Tensor], Tensor]


def _pre_norm_attention(layer: Any, hidden: Tensor, inputs: AttentionInputs) -> Tensor:
    update, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=inputs.rotary,
        attention_mask=inputs.mask,
        past_key_values=inputs.store,
    )
    return update  # type: ignore[no-any-return]


def _pre_norm_mlp(layer: Any, hidden: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


PRE_NORM = Family(_pre_norm_attention, _pre_norm_mlp)

FAMILIES: dict[str, Family] = {"llama": PRE_NORM, "mistral": PRE_NORM, "qwen2": PRE_NORM, "qwen3": PRE_NORM}
"""Families by ``config.model_type``."""


def family_of(config: Any) -> Family:
    """The family of a model, by its configuration.

    Raises:
        ModelError: the family is not known here, or the model slides its attention window.
    """
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"verifiers of type {config.model_type!r} are not supported; supported are: {known}")
    kinds = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in kinds) or (config.model_type == "mistral" and config.sliding_window):
        raise ModelError("verifiers with sliding-window attention are not supported; choose one with full attention")
    return FAMILIES[config.model_type]
