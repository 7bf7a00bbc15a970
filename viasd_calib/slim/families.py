"""What a family of models looks like from inside: its sublayers, called on the model's own modules."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args

from torch import Tensor, nn

from viasd_calib.errors import ModelError

LayerType = Literal["full_attention", "sliding_attention"]
"""Layers of one type share rotary embedding and mask; the names are those of ``config.layer_types``."""

Rotary = tuple[Tensor, Tensor]


class KeyValueStore(Protocol):
    """What an attention module of transformers asks of a cache."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values of ``layer``; return those to attend to."""
        ...


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention sublayers of one layer type have in common in one forward.

    Attributes:
        cache_argument: under which name the attention modules take ``store`` (:func:`cache_argument`).
    """

    rotary: Rotary
    mask: Tensor | None
    store: KeyValueStore
    cache_argument: str


@dataclass(frozen=True)
class Family:
    """How a family's modules are run.

    Attributes:
        attention: what an attention sublayer adds to the residual stream.
        mlp: the same of an MLP sublayer.
        layer_types: the type of each layer, by the model's configuration.
        rotary_by_type: whether the rotary embedding differs between layer types.
    """

    attention: Callable[[nn.Module, Tensor, AttentionInputs], Tensor]
    mlp: Callable[[nn.Module, Tensor], Tensor]
    layer_types: Callable[[Any], list[str]]
    rotary_by_type: bool = False

    def rotary(
        self, module: nn.Module, hidden: Tensor, positions: Tensor, kinds: Collection[LayerType]
    ) -> dict[LayerType, Rotary]:
        """Rotary embeddings of ``positions`` ([1 or batch, width]) by the model's own module, for each layer type."""
        if self.rotary_by_type:
            return {kind: module(hidden, positions, kind) for kind in kinds}
        return dict.fromkeys(kinds, module(hidden, positions))


def _pre_norm_attention(layer: Any, hidden: Tensor, inputs: AttentionInputs) -> Tensor:
    update, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=inputs.rotary,
        attention_mask=inputs.mask,
        **{inputs.cache_argument: inputs.store},
    )
    return update  # type: ignore[no-any-return]


def _pre_norm_mlp(layer: Any, hidden: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


def _both_norms_attention(layer: Any, hidden: Tensor, inputs: AttentionInputs) -> Tensor:
    return layer.post_attention_layernorm(_pre_norm_attention(layer, hidden, inputs))  # type: ignore[no-any-return]


def _both_norms_mlp(layer: Any, hidden: Tensor) -> Tensor:
    update = layer.mlp(layer.pre_feedforward_layernorm(hidden))
    return layer.post_feedforward_layernorm(update)  # type: ignore[no-any-return]


def _never_sliding(config: Any) -> list[str]:
    return ["full_attention"] * config.num_hidden_layers


def _alike(config: Any) -> list[str]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def _listed(config: Any) -> list[str]:
    return list(config.layer_types)


# Phi-3's residual dropouts are left out: they act in training mode alone, and q never is in it.
FAMILIES: dict[str, Family] = {
    "gemma2": Family(_both_norms_attention, _both_norms_mlp, _listed),
    "gemma3_text": Family(_both_norms_attention, _both_norms_mlp, _listed, rotary_by_type=True),
    "llama": Family(_pre_norm_attention, _pre_norm_mlp, _never_sliding),
    "mistral": Family(_pre_norm_attention, _pre_norm_mlp, _alike),
    "phi3": Family(_pre_norm_attention, _pre_norm_mlp, _alike),
    "qwen2": Family(_pre_norm_attention, _pre_norm_mlp, _listed),
    "qwen3": Family(_pre_norm_attention, _pre_norm_mlp, _listed),
}
"""Families by ``config.model_type``."""


def family_of(config: Any) -> Family:
    """The family of a model, by its configuration.

    Raises:
        ModelError: the family is not known here, or the model reads ahead.
    """
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"verifiers of type {config.model_type!r} are not supported; supported are: {known}")
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        raise ModelError("the model attends in both directions and cannot decode; choose one with causal attention")
    return FAMILIES[config.model_type]


def layer_types_of(config: Any) -> list[LayerType]:
    """The type of each decoder layer of a model of a known family.

    Raises:
        ModelError: a layer is of a type that is not known here, or slides a window whose length is not given.
    """
    kinds = family_of(config).layer_types(config)
    unknown = sorted(set(kinds).difference(get_args(LayerType)))
    if unknown:
        known = ", ".join(get_args(LayerType))
        raise ModelError(f"layers of type {unknown[0]!r} are not supported; choose a model with layers of: {known}")
    if "sliding_attention" in kinds and not config.sliding_window:
        raise ModelError(
            "the model has sliding layers, but config.sliding_window gives them no length; "
            "set it (and use_sliding_window, where the model has that) in the model's config.json"
        )
    return cast("list[LayerType]", kinds)


def cache_argument(module: nn.Module) -> str:
    """Under which name a transformers module takes its cache: the argument of its forward that is a ``Cache``.

    It is ``past_key_values`` up to transformers 5.23 and ``cache`` from 5.24 on.

    Args:
        module: an attention module, or a whole model.

    Raises:
        ModelError: its forward takes no cache, or more than one.
    """
    parameters = inspect.signature(module.forward).parameters  # of what decorators wrap
    found = [name for name, one in parameters.items() if re.search(r"\bCache\b", str(one.annotation))]
    if len(found) != 1:
        raise ModelError(
            f"{type(module).__name__} takes {len(found) or 'no'} cache arguments, where one is expected; "
            "this release of viasd_calib does not know how transformers calls it: install a transformers "
            "that its setup.py admits"
        )
    return found[0]


def head_width(config: Any) -> int:
    """Numbers of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window_of(config: Any, kind: LayerType) -> int | None:
    """How many positions a layer of a type reads, its own included; None for all of them."""
    return int(config.sliding_window) if kind == "sliding_attention" else None
