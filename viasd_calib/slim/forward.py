"""The routed forward: q runs every sublayer, q' those of its route; same modules, same cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from viasd_calib.errors import ModelError
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.families import (
    AttentionInputs,
    Family,
    KeyValueStore,
    LayerType,
    family_of,
    layer_types_of,
    window_of,
)
from viasd_calib.slim.grouped import GROUPED
from viasd_calib.slim.packed import PackedLinear
from viasd_calib.spec import Route

SublayerKind = Literal["attention", "mlp"]

MaskOf = Callable[[int | None], Tensor | None]
"""From a sliding window's length, or None for no window, to which slots each token may read: bool
[1 or batch, 1, width, slots]; None where it is all of them."""

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
"""Those of transformers that take a mask of four dimensions."""


@dataclass(frozen=True)
class Sublayer:
    """One attention or MLP sublayer of a decoder layer."""

    kind: SublayerKind
    index: int
    layer: nn.Module
    layer_type: LayerType


class Window(KeyValueStore, Protocol):
    """Where one forward writes and reads; :class:`~viasd_calib.slim.cache.CacheWindow` is one."""

    def positions(self) -> Tensor:
        """Positions of the tokens that are written: [1 or batch, width]."""
        ...

    def mask(self, sliding: int | None = None) -> Tensor | None:
        """Which slots each token may read, as :data:`MaskOf` says."""
        ...


class States(NamedTuple):
    """What one pass leaves at every place.

    Attributes:
        last: after the final norm, [batch, width, hidden].
        tapped: the residual stream after the tapped layers, [batch, width, taps, hidden].
    """

    last: Tensor
    tapped: Tensor


def sublayers_of(
    layers: Iterable[nn.Module], layer_types: Iterable[LayerType], route: Route | None = None
) -> list[Sublayer]:
    """The sublayers that a route keeps, in the order they run; all of them without a route.

    Args:
        layer_types: of each layer.

    Example:
        >>> layers, layer_types = [nn.Identity(), nn.Identity()], ["sliding_attention", "full_attention"]
        >>> kept = sublayers_of(layers, layer_types, Route(attention_skip=[0], mlp_skip=[]))
        >>> [(s.kind, s.index) for s in kept]
        [('mlp', 0), ('attention', 1), ('mlp', 1)]
    """
    kept: list[Sublayer] = []
    for index, (layer, layer_type) in enumerate(zip(layers, layer_types, strict=True)):
        if route is None or index not in route.attention_skip:
            kept.append(Sublayer("attention", index, layer, layer_type))
        if route is None or index not in route.mlp_skip:
            kept.append(Sublayer("mlp", index, layer, layer_type))
    return kept


def share_parameters(module: nn.Module) -> nn.Module:
    """A copy of a module's structure that holds the very same parameters.

    Adapters go into the copy, so that q's own modules stay as they are.
    """
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


class RoutedModel:
    """A causal language model opened into sublayers.

    Args:
        model: a causal language model of a known family, in evaluation mode.
        route: which sublayers q' leaves out.
        slim_layers: the layers q' runs, where they differ from q's by an adapter.

    Raises:
        ModelError: the family, a layer type or the attention implementation is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        route: Route | None = None,
        slim_layers: Iterable[nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.config = model.config
        self.family: Family = family_of(model.config)
        self.layer_types = layer_types_of(model.config)
        self._windows = {kind: window_of(model.config, kind) for kind in sorted(set(self.layer_types))}
        self._needs_additive_mask = _attention_implementation(model.config) == "eager"
        self._final_cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        decoder = model.get_decoder()
        self.layers: nn.ModuleList = decoder.layers
        self._embed: nn.Module = decoder.embed_tokens
        self._norm: nn.Module = decoder.norm
        self._rotary: nn.Module = decoder.rotary_emb
        self.full_sublayers = sublayers_of(self.layers, self.layer_types)
        own = self.layers if slim_layers is None else slim_layers
        self.slim_sublayers = sublayers_of(own, self.layer_types, route)

    @property
    def device(self) -> torch.device:
        """Where the verifier's weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The verifier's number format."""
        return self.model.dtype

    @property
    def _head(self) -> nn.Module:
        # Asked each time: a backend may have exchanged it.
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def alike(self, model: PreTrainedModel) -> RoutedModel:
        """Another model, whole, opened for the same backend."""
        return RoutedModel(model)

    def expect_taps(self, taps: Sequence[int]) -> None:
        """Make ready for passes that are asked for these taps or for none."""

    def prepare_passes(self, lengths: Iterable[int], widest: int) -> None:
        """Do ahead of decoding what a backend does once: nothing, where passes run eager.

        Args:
            lengths: positions of the texts to come, prompt and new tokens.
            widest: most tokens that a pass behind the prompt runs over.

        Raises:
            ModelError: the backend cannot run this model here.
        """

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        """An empty cache with room for ``capacity`` positions."""
        return SharedCache(self.config, capacity, batch=batch, dtype=self.dtype, device=self.device)

    def full(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        """q over ``ids`` ([batch, width]).

        Args:
            taps: after how many layers to keep the residual stream, in rising order.
        """
        return self._forward(self.full_sublayers, ids, window, taps)

    def slim(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        """q' over ``ids`` ([batch, width]); ``taps`` as for :meth:`full`, counted in q's layers."""
        return self._forward(self.slim_sublayers, ids, window, taps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head: [..., hidden] -> [..., vocabulary]."""
        return self.soft_cap(self._head(hidden))

    def soft_cap(self, logits: Tensor) -> Tensor:
        """The model's bound on its logits (Gemma Team 2024, arXiv 2408.00118, section 2), where it has one."""
        if self._final_cap is None:
            return logits
        return torch.tanh(logits / self._final_cap) * self._final_cap

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings: [batch, width] -> [batch, width, hidden]."""
        return self._embed(ids)  # type: ignore[no-any-return]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the output head."""
        return self._norm(hidden)  # type: ignore[no-any-return]

    def embedding_size(self) -> Tensor:
        """Root mean square of the input embeddings, as :meth:`embed` gives them: a scalar."""
        weight, scale = self._embed.weight, getattr(self._embed, "embed_scale", 1.0)  # Gemma's module scales
        return weight.detach().float().square().mean().sqrt() * scale  # type: ignore[operator]

    @property
    def final_norm_module(self) -> nn.Module:
        """The module of that norm."""
        return self._norm

    def head_rows(self, ids: Tensor) -> Tensor:
        """Rows of the output head for ``ids`` ([n]), which give logits before :meth:`soft_cap`: [n, hidden]."""
        head = self._head
        weight = head.plain() if isinstance(head, PackedLinear) else head.weight
        return weight[ids]  # type: ignore[index]

    def attention_inputs(
        self, hidden: Tensor, positions: Tensor, mask_of: MaskOf, store: KeyValueStore
    ) -> dict[LayerType, AttentionInputs]:
        """What the attention sublayers of one forward over ``positions`` ([1 or batch, width]) share, by layer type."""
        rotary = self.family.rotary(self._rotary, hidden, positions, self._windows)
        return {
            kind: AttentionInputs(rotary[kind], self._prepared(mask_of(window), hidden.dtype), store)
            for kind, window in self._windows.items()
        }

    def _prepared(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask as the attention implementation takes it: eager attention adds it to the scores, sdpa takes bools."""
        if mask is None or not self._needs_additive_mask:
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def step(self, sublayer: Sublayer, hidden: Tensor, inputs: Mapping[LayerType, AttentionInputs]) -> Tensor:
        """What one sublayer adds to the residual stream: [batch, width, hidden]."""
        if sublayer.kind == "attention":
            return self.family.attention(sublayer.layer, hidden, inputs[sublayer.layer_type])
        return self.family.mlp(sublayer.layer, hidden)

    def _forward(self, sublayers: Sequence[Sublayer], ids: Tensor, window: Window, taps: Sequence[int]) -> States:
        hidden = self.embed(ids)  # [batch, width, hidden]
        inputs = self.attention_inputs(hidden, window.positions(), window.mask, window)
        tapped: list[Tensor] = []
        for sublayer in sublayers:
            tapped += [hidden for tap in taps[len(tapped) :] if tap <= sublayer.index]
            hidden = hidden + self.step(sublayer, hidden, inputs)
        tapped += [hidden] * (len(taps) - len(tapped))
        stacked = torch.stack(tapped, 2) if tapped else hidden.new_empty((*ids.shape, 0, hidden.shape[-1]))
        return States(self.final_norm(hidden), stacked)


def _attention_implementation(config: PreTrainedConfig) -> str:
    """The attention implementation that a model was loaded with.

    Raises:
        ModelError: it takes its masks in another form than four dimensions, and would misread ours.
    """
    name = str(config._attn_implementation)
    if name not in (*ATTENTION_IMPLEMENTATIONS, GROUPED):
        usable = " or ".join(repr(one) for one in ATTENTION_IMPLEMENTATIONS)
        raise ModelError(f"attention implementation {name!r} is not supported; load the model with {usable}")
    return name
