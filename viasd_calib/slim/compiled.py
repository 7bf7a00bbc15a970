"""Backend ``compiled``: each pass of q and q' as one graph of ``torch.compile``, with shapes that never change.

A decoder's passes are narrow, so that on CUDA the host takes longer to launch their kernels than the device to run
them. A graph is launched at once, but only for shapes and addresses that it was recorded with. So here a pass is
padded to one of few widths, reads the whole cache under a mask, is told its positions as a tensor, and texts take
turns in the same cache memory. Graphs hold no weights: q and q' still share the model's own.

Of all models of a process one pass runs at a time, eager ones of such models too; other threads wait for it. For a
CUDA graph puts in and takes out at places of its own, whichever text it runs for, and what torch.compile looks at
before it takes a graph may not change in the middle of another pass. A thread that decodes on CUDA has to do so in the
same stream as the others.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from viasd_calib.errors import ModelError
from viasd_calib.models import context_length
from viasd_calib.progress import steps
from viasd_calib.slim.cache import CacheWindow, SharedCache, check_context, readable, to_device
from viasd_calib.slim.forward import RoutedModel, States, Window
from viasd_calib.slim.in_process import InProcess
from viasd_calib.slim.plan import Sublayer
from viasd_calib.slim.token_shift import linear_recurrence, repeated
from viasd_calib.spec import Route

WIDTHS = (1, 4, 8, 16, 32)
"""Widths that there are graphs for; a wider pass, such as a prompt's, runs eager."""

SMALLEST_CAPACITY = 256
"""Positions of the smallest cache."""

CALLS_TO_WARM = 3
"""The first call compiles, the second records a CUDA graph, the third replays it."""

_ONE_PASS = threading.RLock()
"""Held while a pass runs, and while its graph or its cache is looked for or made."""

StaticPass = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], States]
"""A pass of one width on one text: ids [1, width], positions [width], each layer's keys and values
[1, heads, capacity, head width] and each bridge's shift states [1, capacity, hidden], which it writes into."""

Compiler = Callable[[StaticPass], StaticPass]
"""What makes a graph of a pass."""


def static_width(width: int) -> int | None:
    """The width that a pass of ``width`` tokens is padded to; None where it runs eager.

    Example:
        >>> static_width(1), static_width(5), static_width(33)
        (1, 8, None)
    """
    return next((static for static in WIDTHS if static >= width), None)


def static_capacity(positions: int, context: int) -> int:
    """The cache size for texts of ``positions``: a power of two, and no more than the model's context.

    Example:
        >>> static_capacity(7, 8192), static_capacity(300, 8192), static_capacity(5000, 8000)
        (256, 512, 8000)
    """
    return min(max(SMALLEST_CAPACITY, 1 << (positions - 1).bit_length()), context)


def compile_whole(run: StaticPass) -> StaticPass:
    """One graph of the whole pass by TorchInductor, as a CUDA graph where there is CUDA.

    ``fullgraph`` refuses what would wait for the device or go back to Python in the middle of a pass.
    """
    return torch.compile(run, fullgraph=True, dynamic=False, mode="reduce-overhead")


@dataclass(frozen=True)
class StaticWindow:
    """Where a pass of one text writes and reads in a cache: all of it, with positions that are a tensor.

    Attributes:
        keys: of each layer, [1, heads, capacity, head width].
        values: the same.
        shift_states: of each bridge with a token shift, [1, capacity, hidden].
        slots: positions of the tokens, [width], long; padding repeats the last one, so that it writes the same again.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    shift_states: Sequence[Tensor]
    slots: Tensor

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write [1, heads, width, head width] and return all slots, [1, heads, capacity, head width]."""
        self.keys[layer].index_copy_(2, self.slots, keys)
        self.values[layer].index_copy_(2, self.slots, values)
        return self.keys[layer], self.values[layer]

    def keep(self, slot: int, stream: Tensor) -> None:
        """Write the stream after a bridged run: [1, width, hidden]."""
        self.shift_states[slot].index_copy_(1, self.slots, stream)

    def recur(self, slot: int, local: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream of q' after a bridged run, which is kept; see ``PreviousTokenStore.recur``."""
        first = self.slots[:1]  # [1]
        before = self.shift_states[slot].index_select(1, (first - 1).clamp(min=0))[:, 0]  # [1, hidden]
        before = torch.where(first > 0, before, 0)
        stream = linear_recurrence(local, before, shift, repeated(self.positions()))
        self.keep(slot, stream)
        return stream

    def positions(self) -> Tensor:
        """Positions of the tokens: [1, width]."""
        return self.slots[None]

    def mask(self, sliding: int | None = None) -> Tensor:
        """Which slots each token may read: bool [1, 1, width, capacity]; ``sliding`` as for ``CacheWindow.mask``."""
        every = torch.arange(self.keys[0].shape[2], device=self.slots.device)
        return readable(every, self.slots[:, None], sliding)[None, None]


class Held:
    """Cache memory that one text after the other uses, at addresses that a CUDA graph may rely on.

    Attributes:
        keys: a view of each layer: writing into these is all that a graph does to the cache, while one tensor of all
            layers would be copied as a whole at every write.
        values: the same.
        shift_states: the same of each bridge with a token shift.
    """

    def __init__(self, memory: SharedCache) -> None:
        self._memory = memory
        self._user: weakref.ref[SharedCache] | None = None
        self.keys = memory.keys.unbind()
        self.values = memory.values.unbind()
        self.shift_states = memory.shift_states.unbind()
        for view in (*self.keys, *self.values, *self.shift_states):
            # Unguarded: other memory of the same shape is recorded anew, not compiled anew.
            torch._dynamo.mark_static_address(view, guard=False)

    @property
    def capacity(self) -> int:
        """Positions it can hold."""
        return self._memory.capacity

    @property
    def free(self) -> bool:
        """Whether the text that last used it is gone."""
        return self._user is None or self._user() is None

    def holds(self, cache: SharedCache) -> bool:
        """Whether ``cache`` is made of this memory."""
        return cache.keys is self._memory.keys

    def lend(self) -> SharedCache:
        """An empty cache of this memory, which is free again once nobody holds that cache."""
        # What an earlier text left is never read, but a value that is not a number would spoil what is masked.
        self._memory.keys.zero_()
        self._memory.values.zero_()
        self._memory.shift_states.zero_()
        cache = copy.copy(self._memory)
        self._user = weakref.ref(cache)
        return cache


class PassKind(NamedTuple):
    """What tells one graph of a model from another."""

    full: bool
    width: int
    capacity: int


class CompiledModel(InProcess, RoutedModel):
    """A routed model whose narrow passes over a single text are graphs.

    Batches, prompts and passes whose taps are not expected run eager, on the same modules. Graphs are compiled by
    :meth:`prepare_passes`, or else when they are first needed. Inductor keeps what it has compiled in the folder
    that the environment variable ``TORCHINDUCTOR_CACHE_DIR`` names.

    Args:
        model: as for :class:`RoutedModel`, and the same for ``route`` and ``held``.
        compiler: makes a graph of a pass.

    Raises:
        ModelError: as :class:`RoutedModel` does; and at a pass, that it cannot be compiled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        route: Route | None = None,
        held: Mapping[str, object] | None = None,
        compiler: Compiler = compile_whole,
    ) -> None:
        super().__init__(model, route, held)
        if self.slim_sublayers == self.full_sublayers:
            self.slim_sublayers = self.full_sublayers  # one graph serves both
        self._compiler = compiler
        self._taps: tuple[int, ...] = ()
        self._held: list[Held] = []
        self._graphs: dict[PassKind, StaticPass] = {}

    def alike(self, model: PreTrainedModel) -> CompiledModel:
        return CompiledModel(model, compiler=self._compiler)

    def expect_taps(self, taps: Sequence[int]) -> None:
        with _ONE_PASS:
            if tuple(taps) != self._taps:
                self._taps = tuple(taps)
                self._graphs.clear()

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        """An empty cache with room for ``capacity`` positions or more; one of a single text may be used memory."""
        if batch > 1:
            return super().new_cache(capacity, batch)
        check_context(self.config, capacity)
        room = static_capacity(capacity, context_length(self.config))
        with _ONE_PASS:
            free = next((held for held in self._held if held.free and held.capacity == room), None)
            if free is None:
                with torch.inference_mode(False):  # memory that any later caller may write into
                    free = Held(super().new_cache(room))
                self._held.append(free)
            return free.lend()

    def prepare_passes(self, lengths: Iterable[int], widest: int, slim: bool = True) -> None:
        context = context_length(self.config)
        capacities = sorted({static_capacity(length, context) for length in lengths})
        widths = [width for width in WIDTHS if width <= (static_width(widest) or WIDTHS[-1])]
        tiers = (True, False) if slim and self.slim_sublayers is not self.full_sublayers else (True,)
        kinds = [PassKind(full, width, capacity) for capacity in capacities for full in tiers for width in widths]
        with _ONE_PASS:
            self._compile([kind for kind in kinds if kind not in self._graphs])

    def _forward(self, sublayers: Sequence[Sublayer], ids: Tensor, window: Window, taps: Sequence[int]) -> States:
        with _ONE_PASS:
            return self._pass(sublayers, ids, window, taps)

    def _pass(self, sublayers: Sequence[Sublayer], ids: Tensor, window: Window, taps: Sequence[int]) -> States:
        width = static_width(ids.shape[1])
        held = self._held_by(window)
        if width is None or held is None or tuple(taps) not in ((), self._taps):
            return super()._forward(sublayers, ids, window, taps)
        assert isinstance(window, CacheWindow), "what a text holds is windowed"
        assert isinstance(window.start, int), "a single text starts at one place"
        kind = PassKind(sublayers is self.full_sublayers, width, held.capacity)
        if kind not in self._graphs:
            self._compile([kind])
        states = self._run(kind, ids, window.start, held)
        return States(states.last, states.tapped[:, :, : len(taps)])

    def _held_by(self, window: Window) -> Held | None:
        """The memory of a single text's window; None where it is not ours."""
        if not isinstance(window, CacheWindow) or not isinstance(window.start, int):
            return None
        cache = window.cache
        return next((held for held in self._held if held.holds(cache)), None)

    @torch.inference_mode()  # graphs are compiled for one such mode, and nobody trains through them
    def _run(self, kind: PassKind, ids: Tensor, start: int, held: Held) -> States:
        """Replay a graph over ``ids`` ([1, width or fewer]) from position ``start`` on."""
        own, width = ids.shape[1], kind.width
        padded = ids.new_empty((1, width))  # always new, so that its strides never differ
        padded[:, :own] = ids
        padded[:, own:] = ids[:, -1:]
        slots = to_device([start + min(step, own - 1) for step in range(width)], ids.device)
        if ids.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        states = self._graphs[kind](padded, slots, held.keys, held.values, held.shift_states)
        # The next replay writes over what this one has put out.
        return States(states.last[:, :own].clone(), states.tapped[:, :own].clone())

    def _compile(self, kinds: Sequence[PassKind]) -> None:
        """Compile passes, and run each until it is at its speed.

        Raises:
            ModelError: one cannot be compiled here.
        """
        from torch._dynamo.exc import TorchDynamoException  # loads the compiler, which the other backends never need

        if not kinds:
            return
        with steps("compile", len(kinds), "passes") as running:
            for kind in kinds:
                self._graphs[kind] = self._compiler(self._static_pass(kind))
                try:
                    self._warm(kind)
                except TorchDynamoException as error:
                    del self._graphs[kind]
                    reason = str(error).strip().splitlines()[0]
                    raise ModelError(
                        f"backend compiled cannot compile this model on {self.device} ({reason}); torch.compile needs "
                        "a C++ compiler, and Triton on CUDA: install them, or choose backend eager"
                    ) from error
                running.advance()

    def _warm(self, kind: PassKind) -> None:
        cache = self.new_cache(kind.capacity)
        held = next(held for held in self._held if held.holds(cache))
        ids = torch.zeros(1, kind.width, dtype=torch.long, device=self.device)
        for _ in range(CALLS_TO_WARM):
            self._run(kind, ids, 0, held)

    def _static_pass(self, kind: PassKind) -> StaticPass:
        forward, taps = super()._forward, self._taps
        sublayers = self.full_sublayers if kind.full else self.slim_sublayers

        def run(
            ids: Tensor, slots: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shift_states: Sequence[Tensor]
        ) -> States:
            return forward(sublayers, ids, StaticWindow(keys, values, shift_states, slots), taps)

        # Compiled code is kept with a function's code object, which all these would share, up to a limit of eight.
        name = f"{'full' if kind.full else 'slim'}_pass_{kind.width}_of_{kind.capacity}"
        own_code = run.__code__.replace(co_name=name)
        return FunctionType(own_code, run.__globals__, name, run.__defaults__, run.__closure__)
