"""Backend ``native``: passes over one text or several by kernels of our own, on a CPU.

Sublayers that the kernels know run in one call for all that follow each other; the others (bridges, adapters) run as
their modules do. So does a pass over several texts where there are any of these; its linear layers are the kernels',
too: there is one copy of each weight. A wide pass, such as a prompt's, runs in parts. What a token gives depends on no
other token of its pass, bit for bit, whatever the width of the pass or the texts beside it: greedy decoding with audit
``strict`` gives the very text of autoregressive decoding in bfloat16, too, and a text that is compared with the full
verifier's choices diverges where it does, not where rounding does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import groupby
from typing import TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel

from viasd_calib.models import context_length
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.compiled import static_capacity
from viasd_calib.slim.families import KeyValueStore, LayerType
from viasd_calib.slim.forward import MaskOf, RoutedModel, States, Window
from viasd_calib.slim.in_process import InProcess
from viasd_calib.slim.native.library import kernels
from viasd_calib.slim.native.linear import NativeLinear
from viasd_calib.slim.native.stack import NativeStack, runs, why_not_run
from viasd_calib.slim.native.tokens import Part, parts_of, places_of, spans_of
from viasd_calib.slim.offload.stream import taken
from viasd_calib.slim.plan import Sublayer
from viasd_calib.spec import Route

WIDEST = 64
"""Tokens that the kernels run at once; a wider pass runs in pieces of so many."""

NO_TABLE = torch.empty(0), torch.empty(0)
"""Cosine and sine of no position."""

Segment = tuple[NativeStack | None, list[Sublayer]]
"""Sublayers in a row, and the call that runs them; None where modules do."""


class NativeModel(InProcess, RoutedModel):
    """A routed model whose passes run in the kernels; arguments as for ``RoutedModel``."""

    integer_kernels = True

    def __init__(
        self, model: PreTrainedModel, route: Route | None = None, held: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(model, route, held)
        self._known = why_not_run(model.config) is None
        self._segments: dict[tuple[int, tuple[int, ...], bool], tuple[Sequence[Sublayer], list[list[Segment]]]] = {}
        self._tables: dict[LayerType, tuple[Tensor, Tensor]] = {}

    @property
    def same_in_batches(self) -> bool:
        heads = [self._head] if self._slim_head is None else [self._head, self._slim_head.linear]
        if not self._known or not all(isinstance(head, NativeLinear) for head in heads):
            return False
        every = (*self._pieces(self.full_sublayers, ()), *self._pieces(self.slim_sublayers, ()))
        return all(stack is not None for piece in every for stack, _ in piece)

    def alike(self, model: PreTrainedModel) -> NativeModel:
        return NativeModel(model)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16  # asked at every pass; transformers looks through all parameters for it

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def run_sublayers(
        self, sublayers: Sequence[Sublayer], hidden: Tensor, positions: Tensor, mask_of: MaskOf, store: KeyValueStore
    ) -> Tensor:
        if not self._runs(store, sublayers):
            return super().run_sublayers(sublayers, hidden, positions, mask_of, store)
        return self._run(sublayers, hidden.flatten(0, 1), store, ())[0].to(self.dtype)

    def _runs(self, window: KeyValueStore, sublayers: Sequence[Sublayer]) -> TypeGuard[CacheWindow]:
        """Whether the kernels run a pass: over a single text, or over several where no module runs between."""
        if not self._known or not isinstance(window, CacheWindow):
            return False
        single = isinstance(window.start, int) and window.cache.batch == 1
        return single or all(stack is not None for piece in self._pieces(sublayers, ()) for stack, _ in piece)

    def _forward(self, sublayers: Sequence[Sublayer], ids: Tensor, window: Window, taps: Sequence[int]) -> States:
        if not self._runs(window, sublayers):
            return super()._forward(sublayers, ids, window, taps)
        last, tapped = self._run(sublayers, self.embed(ids.flatten()), window, tuple(taps))
        none = last.new_empty((*ids.shape, 0, last.shape[-1]), dtype=self.dtype)
        return States(self._normed(last), torch.stack(tapped, 2) if tapped else none)

    def _run(
        self, sublayers: Sequence[Sublayer], entering: Tensor, window: CacheWindow, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """The residual stream [batch, width, hidden] after the last sublayer, float32, and at each tap, bfloat16.

        Args:
            entering: what enters the first sublayer, [batch width, hidden].
        """
        spans = spans_of(window)
        parts = parts_of(window, spans, WIDEST)
        places = None if window.widths is None else places_of(spans, window.width)
        if places is not None:
            entering = entering[places[0]]  # [tokens, hidden]
        streams = [some.float().contiguous() for some in entering.split([part.tokens for part in parts])]

        def found(streams: list[Tensor]) -> Tensor:
            stream = joined(streams)  # [tokens, hidden]
            return stream.view(len(spans), window.width, -1) if places is None else stream[places[1]]

        tapped: list[Tensor] = []
        for number, piece in enumerate(self._pieces(sublayers, taps, by_layer=len(parts) > 1)):
            streams = self._through(piece, streams, parts)
            if number < len(taps):
                tapped.append(found(streams).to(self.dtype))
        return found(streams), tapped

    def _through(self, piece: list[Segment], streams: list[Tensor], parts: list[Part]) -> list[Tensor]:
        """The residual stream of each part of a pass after the sublayers of a piece."""
        for stack, own in piece:
            with nullcontext() if stack is None else self._in_memory(own[0]):  # modules see to that themselves
                streams = [self._advanced(stack, own, *one) for one in zip(streams, parts, strict=True)]
        return streams

    def _in_memory(self, sublayer: Sublayer) -> AbstractContextManager[None]:
        """For how long a sublayer's weights are in memory, where they are read for each pass."""
        position = self._cold_position(sublayer)
        return nullcontext() if self.cold is None or position is None else taken(self.cold.stream, position)

    def _cold_position(self, sublayer: Sublayer) -> int | None:
        """Of a sublayer that is read for each pass, among these; None for one that is in memory."""
        if self.cold is None or sublayer.kind == "bridge" or sublayer.layer is not self.layers[sublayer.index]:
            return None
        return self.cold.positions.get((sublayer.kind, sublayer.index))

    def _advanced(self, stack: NativeStack | None, sublayers: list[Sublayer], stream: Tensor, part: Part) -> Tensor:
        """The residual stream [tokens, hidden], float32, after some sublayers."""
        if stack is not None:
            cache = part.window.cache
            stack.run(stream, self._rotary_of(sublayers[0].layer_type, part), cache.keys, cache.values, part.texts)
            return stream
        hidden = stream[None].to(self.dtype)  # [1, width, hidden]
        inputs = self.attention_inputs(hidden, part.window.positions(), part.window.mask, part.window)
        for sublayer in sublayers:
            hidden = self.advance(sublayer, hidden, inputs, part.window)
        return hidden[0].float()

    def _pieces(
        self, sublayers: Sequence[Sublayer], taps: tuple[int, ...], by_layer: bool = False
    ) -> list[list[Segment]]:
        """The sublayers between taps, in segments: found once for each list of sublayers.

        Args:
            by_layer: whether a segment ends with a layer, so that all parts of a wide pass go through its weights while
                they are in the caches of the CPU.
        """
        key = id(sublayers), taps, by_layer
        if key not in self._segments:
            pieces: list[list[Segment]] = []
            begin = 0
            for tap in taps:
                end = next((n for n, one in enumerate(sublayers) if one.index >= tap), len(sublayers))
                pieces.append(self._segmented(sublayers[begin:end], by_layer))
                begin = end
            pieces.append(self._segmented(sublayers[begin:], by_layer))
            self._segments[key] = sublayers, pieces  # the list is held, so that no other takes its identity
        return self._segments[key][1]

    def _segmented(self, sublayers: Sequence[Sublayer], by_layer: bool) -> list[Segment]:
        def kind(sublayer: Sublayer) -> tuple[bool, LayerType, int, int | None]:
            known = runs(sublayer) and sublayer.end not in self.token_shift_ends
            layer = sublayer.index if by_layer else 0
            return known, sublayer.layer_type, layer, self._cold_position(sublayer)

        grouped = [(known, list(own)) for (known, *_), own in groupby(sublayers, kind)]
        return [(NativeStack(self.config, own) if known else None, own) for known, own in grouped]

    def rotary_at(self, kind: LayerType, start: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions of a single text, [width, head width], float32."""
        cosine, sine = self._table(kind, start + width)
        return cosine[start : start + width], sine[start : start + width]

    def _rotary_of(self, kind: LayerType, part: Part) -> tuple[Tensor, Tensor]:
        """Cosine and sine of a part's positions, [tokens, head width], float32."""
        if len(part.texts) == 1:
            _, start, width = part.texts[0]
            return self.rotary_at(kind, start, width)
        if kind not in part.rotary:
            cosine, sine = self._table(kind, part.length)
            part.rotary[kind] = cosine[part.positions], sine[part.positions]
        return part.rotary[kind]

    def _table(self, kind: LayerType, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions, [as long as texts have been, head width], float32."""
        cosine, sine = self._tables.get(kind, NO_TABLE)
        if len(cosine) < length:
            positions = torch.arange(static_capacity(length, context_length(self.config)))[None]
            inputs = self.family.rotary(self._rotary, torch.zeros(1, 1, 1), positions, (kind,))
            cosine, sine = (one[0].float().contiguous() for one in inputs[kind])
            self._tables[kind] = cosine, sine
        return cosine, sine

    def _normed(self, stream: Tensor) -> Tensor:
        """The stream [..., hidden], float32, after the final norm, bfloat16."""
        out = torch.empty(stream.shape, dtype=torch.bfloat16)
        weight, rows = self._final_weight, stream.numel() // stream.shape[-1]
        kernels().viasd_norm(
            stream.contiguous().data_ptr(), stream.shape[-1], rows, weight.data_ptr(), self.config.rms_norm_eps,
            out.data_ptr(),
        )  # fmt: skip
        return out

    @cached_property
    def _final_weight(self) -> Tensor:
        return self._norm.weight.detach().float().contiguous()  # type: ignore[operator]


def joined(parts: list[Tensor]) -> Tensor:
    """Parts of a pass as one, [width, hidden]."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]
