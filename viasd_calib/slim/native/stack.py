"""Sublayers in a row as the kernels run them: one call for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from viasd_calib.slim.families import head_width, window_of
from viasd_calib.slim.fused_linear import FusedLinearPart
from viasd_calib.slim.native.library import CacheStruct, LayerStruct, LinearStruct, ModelStruct, TextStruct
from viasd_calib.slim.native.linear import NativeLinear
from viasd_calib.slim.native.packing import pointer_to
from viasd_calib.slim.native.team import call
from viasd_calib.slim.native.tokens import TextSpan
from viasd_calib.slim.plan import Sublayer

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose sublayers the kernels know: one norm before each, on root mean squares, and no soft caps."""


def why_not_run(config: PreTrainedConfig) -> str | None:
    """What in a model the kernels do not know, in words; None where they run its sublayers."""
    if config.model_type not in FAMILIES:
        return f"models of type {config.model_type}"
    width = head_width(config)
    if width % 32 or width > 512:
        return f"heads of {width} numbers"
    if config.hidden_size % 16 or config.intermediate_size % 16:
        return "sizes that are no multiples of 16"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return "rotary embeddings that change with the length of a text"
    if config.hidden_act not in ACTIVATIONS:
        return f"the activation {config.hidden_act}"
    return None


class NativeStack:
    """Sublayers that run one after the other in a single call.

    Args:
        config: of the model.
        sublayers: attention and MLP sublayers in their order, whose linear layers are :class:`NativeLinear`.
    """

    def __init__(self, config: PreTrainedConfig, sublayers: Sequence[Sublayer]) -> None:
        self._kept: list[Tensor] = []  # what structs point to
        layers: list[LayerStruct] = []
        for before, sublayer in zip([None, *sublayers], sublayers, strict=False):
            joins = (
                before is not None
                and sublayer.kind == "mlp"
                and (before.kind, before.layer) == ("attention", sublayer.layer)
            )
            if not joins:
                layers.append(LayerStruct())
            self._describe(layers[-1], sublayer, config)
        self._layers = (LayerStruct * len(layers))(*layers)
        self._model = ModelStruct(
            *(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head_width(config)),
            *(max([0, *(layer.gate_up.outputs // 2 for layer in layers)]), ACTIVATIONS[config.hidden_act]),
            *(config.rms_norm_eps, head_width(config) ** -0.5),
        )

    def run(
        self, stream: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, texts: Sequence[TextSpan]
    ) -> None:
        """Run all over tokens of some texts.

        Args:
            stream: the residual stream, [tokens, hidden], float32; changed in place.
            rotary: cosine and sine of their positions, [tokens, head width], float32.
            keys: of the cache, [layers, texts, heads, capacity, head width], bfloat16; written, and read up to each
                token.
            values: the same.
            texts: whose tokens these are, in their order; each text once.
        """
        cosine, sine = rotary
        cache, spans = cache_struct(keys, values), (TextStruct * len(texts))(*(TextStruct(*text) for text in texts))
        call(
            "viasd_run",
            *(*self.pointers, pointer_to(cache), pointer_to(spans), len(texts)),
            *(stream.data_ptr(), cosine.data_ptr(), sine.data_ptr()),
        )

    @property
    def pointers(self) -> tuple[int, int, int]:
        """Where model and layers lie, and how many layers there are; valid as long as the stack is held."""
        return pointer_to(self._model), pointer_to(self._layers), len(self._layers)

    def _describe(self, struct: LayerStruct, sublayer: Sublayer, config: PreTrainedConfig) -> None:
        layer: Any = sublayer.layer
        if sublayer.kind == "attention":
            attention = layer.self_attn
            struct.attention_norm = self._pointer(layer.input_layernorm.weight)
            for name in ("query_norm", "key_norm"):
                norm = getattr(attention, f"{name[0]}_norm", None)
                setattr(struct, name, None if norm is None else self._pointer(norm.weight))
            struct.qkv = self._linear(product_of(attention, ("q_proj", "k_proj", "v_proj")))
            struct.out = self._linear(attention.o_proj)
            struct.index = attention.layer_idx
            struct.window = window_of(config, sublayer.layer_type) or 0
        else:
            struct.mlp_norm = self._pointer(layer.post_attention_layernorm.weight)
            struct.gate_up = self._linear(product_of(layer.mlp, ("gate_proj", "up_proj")), tile_pairs=True)
            struct.down = self._linear(layer.mlp.down_proj)

    def _linear(self, layer: nn.Module | None, tile_pairs: bool = False) -> LinearStruct:
        assert isinstance(layer, NativeLinear), "runs(sublayer) was asked before"
        self._kept += [*layer.packed[2:], *([] if layer.bias is None else [layer.bias])]
        return layer.struct(tile_pairs)

    def _pointer(self, weight: Tensor) -> int:
        self._kept.append(weight.detach().float().contiguous())
        return self._kept[-1].data_ptr()


def cache_struct(keys: Tensor, values: Tensor) -> CacheStruct:
    """What the kernels are told of texts' keys and values, [layers, texts, heads, capacity, head width] each."""
    strides = keys.stride(0), keys.stride(1), keys.stride(2) // keys.shape[-1]
    return CacheStruct(keys.data_ptr(), values.data_ptr(), *strides)


def runs(sublayer: Sublayer) -> bool:
    """Whether the kernels run a sublayer: all of its linear layers are theirs."""
    layer: Any = sublayer.layer
    if sublayer.kind == "attention":
        attention = layer.self_attn
        return product_of(attention, ("q_proj", "k_proj", "v_proj")) is not None and isinstance(
            attention.o_proj, NativeLinear
        )
    if sublayer.kind != "mlp" or not isinstance(layer.mlp.down_proj, NativeLinear):
        return False
    entering = product_of(layer.mlp, ("gate_proj", "up_proj"))
    return entering is not None and entering.out_features % 32 == 0


def product_of(holder: nn.Module, names: Sequence[str]) -> NativeLinear | None:
    """The one product that gives what these layers of a module give; None where there is none."""
    parts = [part for name in names if isinstance(part := getattr(holder, name, None), FusedLinearPart)]
    if len(parts) < len(names):
        return None
    product = parts[0].product
    whole = all(part.product is product and part.number == number for number, part in enumerate(parts))
    known = whole and len(product.sizes) == len(names) and isinstance(product.linear, NativeLinear)
    return product.linear if known else None  # type: ignore[return-value]
