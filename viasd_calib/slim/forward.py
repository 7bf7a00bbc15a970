"""The routed forward: q runs every sublayer, q' those of its route; same modules, same cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

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
    cache_argument,
    family_of,
    layer_types_of,
    window_of,
)
from viasd_calib.slim.grouped_query_attention import GROUPED, additive_mask, grouped_mask
from viasd_calib.slim.linears import PackedLinear
from viasd_calib.slim.memory import added_memory
from viasd_calib.slim.parts.base import install_parts
from viasd_calib.slim.parts.head_vocab import over_vocabulary
from viasd_calib.slim.plan import SlimPlan, StandIn, Sublayer
from viasd_calib.slim.token_shift import PreviousTokenStore
from viasd_calib.spec import Route

if TYPE_CHECKING:
    from viasd_calib.slim.offload.install import ColdSublayers

MaskOf = Callable[[int | None], Tensor | None]
"""From a sliding window's length, or None for no window, to which slots each token may read: bool
[1 or batch, 1, width, slots]; None where it is all of them."""

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
"""Those of transformers that take a mask of four dimensions."""


class Window(KeyValueStore, PreviousTokenStore, Protocol):
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
    layers: Sequence[nn.Module] | nn.ModuleList,
    layer_types: Iterable[LayerType],
    route: Route | None = None,
    bridges: nn.ModuleDict | None = None,
) -> list[Sublayer]:
    """The sublayers that a route keeps, in the order they run; all of them without a route.

    Args:
        layer_types: of each layer.
        bridges: what replaces skipped runs, by name; runs without one are left out.

    Example:
        >>> layers, layer_types = [nn.Identity(), nn.Identity()], ["sliding_attention", "full_attention"]
        >>> kept = sublayers_of(layers, layer_types, Route(attention_skip=[0], mlp_skip=[]))
        >>> [(s.kind, s.index) for s in kept]
        [('mlp', 0), ('attention', 1), ('mlp', 1)]
    """
    plan = SlimPlan(layers, layer_types, route)
    if route is not None:
        install_parts(plan, {"bridges": bridges})
    return plan.sublayers()


class RoutedModel:
    """A causal language model opened into sublayers.

    Args:
        model: a causal language model of a known family, in evaluation mode.
        route: which sublayers q' leaves out.
        held: what the parts of the route hold, by name (:func:`~viasd_calib.slim.parts.base.load_parts`).

    Raises:
        ModelError: the family, a layer type or the attention implementation is not supported, or a part of the route
            is given nothing to hold.
        SpecError: what a part holds does not fit the model.
    """

    integer_kernels: ClassVar[bool] = False
    """Whether what prepares modules for it exchanges :class:`~viasd_calib.slim.low_bit.LowBitLinear` for kernels."""

    def __init__(
        self,
        model: PreTrainedModel,
        route: Route | None = None,
        held: Mapping[str, object] | None = None,
    ) -> None:
        self.model = model
        self.config = model.config
        self.family: Family = family_of(model.config)
        self.layer_types = layer_types_of(model.config)
        self._windows = {kind: window_of(model.config, kind) for kind in sorted(set(self.layer_types))}
        _check_attention(model.config)
        self._heads_per_key: int = model.config.num_attention_heads // model.config.num_key_value_heads
        self._final_cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        decoder = model.get_decoder()
        self.layers: nn.ModuleList = decoder.layers
        self._cache_argument = cache_argument(self.layers[0].self_attn)
        self._embed: nn.Module = decoder.embed_tokens
        self._norm: nn.Module = decoder.norm
        self._rotary: nn.Module = decoder.rotary_emb
        self.full_sublayers = sublayers_of(self.layers, self.layer_types)
        plan = SlimPlan(self.layers, self.layer_types, route, self)
        install_parts(plan, held or {})
        self.slim_layers: nn.ModuleList = (
            plan.layers if isinstance(plan.layers, nn.ModuleList) else nn.ModuleList(plan.layers)
        )
        """The layers whose sublayers q' runs: q's own, or copies that parts of the route made."""
        self.slim_sublayers = plan.sublayers()
        self.token_shift_ends: Sequence[int] = plan.kept_streams
        """Numbers of the sublayers before which q's passes keep the residual stream, for bridges with a token shift."""
        self._slim_head = plan.head
        self.slim_networks = plan.own_networks()
        """What q' runs beside q's own modules, for a backend to prepare."""
        folded = plan.route.adapter is not None and plan.route.adapter.folded
        self.memory = added_memory(model, plan.run_modules(), folded)
        """Weights that q' has beside q's own."""
        self.cold: ColdSublayers | None = None
        """q's sublayers that are read for each of its passes; None where all are in memory."""

    @property
    def device(self) -> torch.device:
        """Where the verifier's weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The verifier's number format."""
        return self.model.dtype

    @property
    def same_in_batches(self) -> bool:
        """Whether what passes of q and q' give for a text hangs, bit for bit, on no other text of a batch."""
        return False

    @property
    def _head(self) -> nn.Module:
        # Asked each time: a backend may have exchanged it.
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def alike(self, model: PreTrainedModel) -> RoutedModel:
        """Another model, whole, opened for the same backend."""
        return RoutedModel(model)

    def expect_taps(self, taps: Sequence[int]) -> None:
        """Make ready for passes that are asked for these taps or for none."""

    def prepare_passes(self, lengths: Iterable[int], widest: int, slim: bool = True) -> None:
        """Do ahead of decoding what a backend does once: nothing, where passes run eager.

        Args:
            lengths: positions of the texts to come, prompt and new tokens.
            widest: most tokens that a pass after the prompt runs over.
            slim: whether q' is to run, too.

        Raises:
            ModelError: the backend cannot run this model here.
        """

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        """An empty cache with room for ``capacity`` positions."""
        shifts = len(self.token_shift_ends)
        return SharedCache(self.config, capacity, batch=batch, shifts=shifts, dtype=self.dtype, device=self.device)

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
        """q's output head: [..., hidden] -> [..., vocabulary]."""
        return self.soft_cap(self._head(hidden))

    def slim_logits(self, hidden: Tensor) -> Tensor:
        """The output head of q': [..., hidden] -> [..., vocabulary], -inf for tokens outside its head vocabulary."""
        if self._slim_head is None:
            return self.soft_cap(self._head(hidden))
        some = self.soft_cap(self._slim_head(hidden))  # [..., head vocabulary]
        ids = self._slim_head.ids
        return some if ids is None else over_vocabulary(some, ids, self.config.vocab_size)

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

    def head_rows(self, ids: Tensor | None = None) -> Tensor:
        """Rows of the output head for ``ids`` ([n]), which give logits before :meth:`soft_cap`: [n, hidden].

        Args:
            ids: None for all rows, which are then those of the head itself.
        """
        head = self._head
        weight: Any = head.plain() if isinstance(head, PackedLinear) else head.weight
        return weight if ids is None else weight[ids]  # type: ignore[no-any-return]

    def attention_inputs(
        self, hidden: Tensor, positions: Tensor, mask_of: MaskOf, store: KeyValueStore
    ) -> dict[LayerType, AttentionInputs]:
        """What the attention sublayers of one forward over ``positions`` ([1 or batch, width]) share, by layer type."""
        rotary = self.family.rotary(self._rotary, hidden, positions, self._windows)
        return {
            kind: AttentionInputs(
                rotary[kind], self._prepared(mask_of(window), hidden.dtype), store, self._cache_argument
            )
            for kind, window in self._windows.items()
        }

    def _prepared(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask as the attention implementation takes it: eager attention adds it to the scores, sdpa takes bools."""
        # Asked each time: a backend may have exchanged it.
        implementation = self.config._attn_implementation
        if mask is None or implementation == "sdpa":
            return mask
        if implementation == GROUPED:
            return grouped_mask(mask, dtype, self._heads_per_key)
        return additive_mask(mask, dtype)

    def step(self, sublayer: Sublayer, hidden: Tensor, inputs: Mapping[LayerType, AttentionInputs]) -> Tensor:
        """What one sublayer adds to the residual stream, a bridge without its token shift: [batch, width, hidden]."""
        match sublayer.kind:
            case "attention":
                return self.family.attention(sublayer.layer, hidden, inputs[sublayer.layer_type])
            case "mlp":
                return self.family.mlp(sublayer.layer, hidden)
            case "bridge":
                return sublayer.layer(hidden)  # type: ignore[no-any-return]

    def advance(
        self,
        sublayer: Sublayer,
        hidden: Tensor,
        inputs: Mapping[LayerType, AttentionInputs],
        previous: PreviousTokenStore,
    ) -> Tensor:
        """The residual stream after one sublayer, kept in ``previous`` where a bridge is to read it.

        Args:
            hidden: the stream before it, [batch, width, hidden].
        """
        stream = hidden + self.step(sublayer, hidden, inputs)
        if sublayer.end not in self.token_shift_ends:
            return stream
        slot = self.token_shift_ends.index(sublayer.end)
        if isinstance(sublayer.layer, StandIn):
            return previous.recur(slot, stream, sublayer.layer.token_shift)
        previous.keep(slot, stream)
        return stream

    def run_sublayers(
        self, sublayers: Sequence[Sublayer], hidden: Tensor, positions: Tensor, mask_of: MaskOf, store: KeyValueStore
    ) -> Tensor:
        """The residual stream [batch, width, hidden] after some sublayers without bridges.

        Args:
            sublayers: the same list at each call.
            hidden: what enters the first one, [batch, width, hidden].
            positions: [1 or batch, width].
            store: where they write and read, with as many layers as theirs; a window of a cache has these positions
                and this mask.
        """
        inputs = self.attention_inputs(hidden, positions, mask_of, store)
        for sublayer in sublayers:
            hidden = hidden + self.step(sublayer, hidden, inputs)
        return hidden

    def _forward(self, sublayers: Sequence[Sublayer], ids: Tensor, window: Window, taps: Sequence[int]) -> States:
        hidden = self.embed(ids)  # [batch, width, hidden]
        inputs = self.attention_inputs(hidden, window.positions(), window.mask, window)
        tapped: list[Tensor] = []
        for sublayer in sublayers:
            tapped += [hidden for tap in taps[len(tapped) :] if tap <= sublayer.index]
            hidden = self.advance(sublayer, hidden, inputs, window)
        tapped += [hidden] * (len(taps) - len(tapped))
        stacked = torch.stack(tapped, 2) if tapped else hidden.new_empty((*ids.shape, 0, hidden.shape[-1]))
        return States(self.final_norm(hidden), stacked)


def _check_attention(config: PreTrainedConfig) -> None:
    """Refuse a model whose attention takes its masks in another form than four dimensions, and would misread ours.

    Raises:
        ModelError: naming the implementation.
    """
    name = str(config._attn_implementation)
    if name not in (*ATTENTION_IMPLEMENTATIONS, GROUPED):
        usable = " or ".join(repr(one) for one in ATTENTION_IMPLEMENTATIONS)
        raise ModelError(f"attention implementation {name!r} is not supported; load the model with {usable}")
