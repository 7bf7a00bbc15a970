"""A shallow drafter: the verifier's last layers after a linear replacement of all that came before them.

The drafter reads, at each place, the token and the verifier's residual stream of the place before, at
several depths (Li et al. 2024, EAGLE, arXiv 2401.15077, section 4.1; Li et al. 2025, EAGLE-3, arXiv
2503.01840, section 3.1), and falls back on its own state where no verifier has run. Its output is
restricted to the verifier's most frequent tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedConfig

from viasd_calib.draft.base import (
    CachedDrafter,
    CachedTextDrafter,
    DraftContext,
    Pick,
    Proposal,
    StopRule,
    builds,
    draft_stepwise,
    first_read,
    to_verifier_ids,
)
from viasd_calib.draft.checking import MEND
from viasd_calib.draft.native_shallow import UNIT_EPSILON, NativeSteps, StepTensors, native_steps
from viasd_calib.errors import ModelError
from viasd_calib.files import write_bytes
from viasd_calib.models.offloaded import layers_in_memory
from viasd_calib.passes.requests import Cost, Passes, Request, ranges_of
from viasd_calib.slim.cache import CacheRow, CacheWindow, SharedCache, readable, repeat_last, window_of_rows
from viasd_calib.slim.families import KeyValueStore
from viasd_calib.slim.forward import MaskOf, RoutedModel, sublayers_of
from viasd_calib.spec import ShallowDraft, ShallowShape


def draft_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The verifier's configuration with its last ``num_layers`` decoder layers alone."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = num_layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[-num_layers:]
    return shallow


def unit_size(states: Tensor) -> Tensor:
    """States ([..., hidden]) at root mean square 1: a residual stream grows with depth, and early texts' first
    tokens hold values a thousand times as large."""
    return nn.functional.rms_norm(states, states.shape[-1:], eps=UNIT_EPSILON)


class ShallowModel(nn.Module):
    """The drafter's trainable part; embeddings and rotary tables are the verifier's, held by reference.

    The residual stream that enters its layers is a sum of linear maps: of the token's embedding, and of a
    *condition*, which comes from the verifier's residual stream at the taps or from the drafter's own
    state, both of the place before. Untrained it reads the embedding alone;
    :func:`viasd_calib.training.closed_form.fit_stand_in` gives it a start that already predicts.

    Args:
        verifier: the opened verifier, whose last layers the drafter's begin as.
        shape: layers, output vocabulary and taps.

    Raises:
        ModelError: the verifier has too few layers for the shape.
    """

    vocabulary: Tensor
    token_size: Tensor

    def __init__(self, verifier: RoutedModel, shape: ShallowShape) -> None:
        super().__init__()
        _check_shape(shape, len(verifier.layers))
        hidden = verifier.config.hidden_size
        self.shape = shape
        self.config = draft_config(verifier.config, shape.num_layers)
        last = verifier.layers[len(verifier.layers) - shape.num_layers :]
        with layers_in_memory(verifier.model, [weight for layer in last for weight in layer.parameters()]):
            self.layers = nn.ModuleList(_own_layer(layer, slot) for slot, layer in enumerate(last))
        self.from_token = nn.Linear(hidden, hidden)
        self.from_taps = nn.Linear(len(shape.taps) * hidden, hidden, bias=False)
        self.from_own = nn.Linear(hidden, hidden, bias=False)
        self.norm = copy.deepcopy(verifier.final_norm_module)
        self.head = nn.Linear(hidden, shape.head_vocab, bias=False)
        self.register_buffer("vocabulary", torch.arange(shape.head_vocab))
        self.register_buffer("token_size", verifier.embedding_size())
        self.sublayers = sublayers_of(self.layers, verifier.layer_types[-shape.num_layers :])
        self._verifier = [verifier]  # in a list, so that its weights are not counted as the drafter's
        self.requires_grad_(True)
        with torch.no_grad():
            for linear in (self.from_token, self.from_taps, self.from_own):
                linear.weight.zero_()
            self.from_token.bias.zero_()
            self.from_token.weight.fill_diagonal_(float(self.token_size))
        self.to(dtype=verifier.dtype, device=verifier.device)

    @property
    def verifier(self) -> RoutedModel:
        """The verifier whose embeddings are read."""
        return self._verifier[0]

    def use_vocabulary(self, ids: Tensor) -> None:
        """Restrict the output to verifier ids ``ids`` ([head_vocab]); the head begins as those rows of q's."""
        with torch.no_grad():
            self.vocabulary.copy_(ids)
            self.head.weight.copy_(self.verifier.head_rows(ids))

    def embed(self, ids: Tensor) -> Tensor:
        """The verifier's embeddings at root mean square 1 over the vocabulary: [batch, width, hidden]."""
        return self.verifier.embed(ids) / self.token_size

    def condition(self, tapped: Tensor) -> Tensor:
        """From the verifier's residual stream ([..., taps, hidden]) the condition of the place after: [..., hidden]."""
        return self.from_taps(unit_size(tapped).flatten(-2))  # type: ignore[no-any-return]

    def own_condition(self, states: Tensor) -> Tensor:
        """The same from the drafter's own states ([..., hidden]): [..., hidden]."""
        return self.from_own(unit_size(states))  # type: ignore[no-any-return]

    def forward(
        self, ids: Tensor, conditions: Tensor, positions: Tensor, mask_of: MaskOf, store: KeyValueStore
    ) -> Tensor:
        """States of the drafter, before its norm: [batch, width, hidden].

        Args:
            ids: tokens, [batch, width].
            conditions: of each token, from the place *before* it, [batch, width, hidden].
            positions: [1 or batch, width].
        """
        hidden: Tensor = self.from_token(self.embed(ids)) + conditions  # [batch, width, hidden]
        return self.verifier.run_sublayers(self.sublayers, hidden, positions, mask_of, store)

    def logits(self, states: Tensor) -> Tensor:
        """[..., hidden] -> [..., head_vocab]."""
        return self.verifier.soft_cap(self.head(self.norm(states)))

    @cached_property
    def _native(self) -> NativeSteps | None:
        return native_steps(self)

    def step(self, ids: Tensor, conditions: Tensor, known: int, window: CacheWindow) -> StepTensors:
        """Run tokens ([width]) of a single text, with their conditions ([width, hidden]).

        Args:
            known: leading places that a verifier has run on; the places after the others get the drafter's own
                condition.
            window: of the drafter's cache, over these tokens.
        """
        if self._native is not None:
            return self._native.step(ids, conditions, known, window)
        states = self(ids[None], conditions[None], window.positions(), window.mask, window)[0]  # [width, hidden]
        return StepTensors(self.logits(states[-1]), self.own_condition(states[known:]))


def _check_shape(shape: ShallowShape, layers: int) -> None:
    if shape.num_layers > layers:
        raise ModelError(f"a drafter of {shape.num_layers} layers is deeper than the verifier, which has {layers}")
    if shape.taps[-1] > layers:
        raise ModelError(f"the drafter reads the verifier after layer {shape.taps[-1]}, the verifier has {layers}")


def _own_layer(layer: nn.Module, slot: int) -> nn.Module:
    """A copy of a verifier layer with weights of its own, that writes into cache slot ``slot``."""
    own: Any = copy.deepcopy(layer)
    own.self_attn.layer_idx = slot
    return own  # type: ignore[no-any-return]


def save_shallow(model: ShallowModel, path: Path) -> None:
    """Write the drafter's tensors in bfloat16, atomically; embeddings are the verifier's and not written."""
    tensors = {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor.to(torch.int32)).contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    write_bytes(path, save(tensors))


def load_shallow(verifier: RoutedModel, shape: ShallowShape, path: Path) -> ShallowModel:
    """Read a drafter that ``save_shallow`` wrote.

    Raises:
        ModelError: the file is not a drafter for this verifier.
    """
    model = ShallowModel(verifier, shape)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is not a shallow drafter for this verifier: {error}; {MEND}") from error
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            wrong = "is missing"
        elif name not in own:
            wrong = "is one tensor too many"
        elif own[name].shape != tensors[name].shape:
            wrong = f"is of shape {list(tensors[name].shape)}, not {list(own[name].shape)}"
        else:
            continue
        raise ModelError(f"{path} is not a shallow drafter for this verifier: {name} {wrong}; {MEND}")
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class ShallowStep(Request[StepTensors]):
    """One forward of a shallow drafter over tokens of a text.

    Attributes:
        row: the drafter's keys and values.
        start: position of the first token.
        ids: [width], long.
        conditions: of each token, from the place before it, [width, hidden].
        known: leading places that a verifier has run on.
    """

    cost = Cost.DRAFT
    model: ShallowModel
    row: CacheRow
    start: int
    ids: Tensor
    conditions: Tensor
    known: int

    def run(self) -> StepTensors:
        return self.model.step(self.ids, self.conditions, self.known, self.row.window(self.start, self.ids.shape[0]))

    @classmethod
    def run_together(cls, requests: Sequence[Self]) -> list[StepTensors]:
        model = requests[0].model
        widths = [request.ids.shape[0] for request in requests]
        window = window_of_rows([r.row for r in requests], [r.start for r in requests], widths)
        ids, conditions = repeat_last([r.ids for r in requests]), repeat_last([r.conditions for r in requests])
        states = model(ids, conditions, window.positions(), window.mask, window)  # [batch, widest, hidden]
        own = [rows[request.known : width] for rows, request, width in zip(states, requests, widths, strict=True)]
        after = model.own_condition(torch.cat(own))  # [places without a verifier, hidden]
        logits = model.logits(torch.stack([rows[width - 1] for rows, width in zip(states, widths, strict=True)]))
        ends = ranges_of([rows.shape[0] for rows in own])
        return [StepTensors(one, after[begin:end]) for one, (begin, end) in zip(logits, ends, strict=True)]


class ShallowDrafter(CachedDrafter):
    """Drafts with a :class:`ShallowModel`, following the verifiers' residual stream.

    Args:
        prompt_window: how many of a prompt's last tokens the model reads, at most; None for all.
    """

    def __init__(self, model: ShallowModel, prompt_window: int | None = None) -> None:
        self.model = model
        self.prompt_window = prompt_window
        self.vocabulary = model.vocabulary
        self.taps = model.shape.taps
        self.networks = (model,)

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        verifier = self.model.verifier
        return SharedCache(self.model.config, capacity, batch=batch, dtype=verifier.dtype, device=verifier.device)

    def follow(self, row: CacheRow) -> ShallowTextDrafter:
        return ShallowTextDrafter(row, self.model, self.prompt_window)

    def score(self, text: Tensor, tapped: Tensor, depth: Tensor, prompt_length: int = 0) -> tuple[Tensor, Tensor]:
        first = first_read(prompt_length, self.prompt_window)
        read = text[first:]
        states = unrolled_states(self.model, read[None], tapped[None, first:], int(depth.max()) + 1)
        picked = torch.stack(states)[depth[first:], 0, torch.arange(len(read), device=text.device)]  # [read, hidden]
        return self._said(picked, first)

    def score_by_depth(
        self, text: Tensor, tapped: Tensor, depths: int, prompt_length: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As for every drafter: one unrolling has all depths."""
        first = first_read(prompt_length, self.prompt_window)
        unrolled = unrolled_states(self.model, text[None, first:], tapped[None, first:], depths)
        return (self._said(states[0], first) for states in unrolled)

    def _said(self, states: Tensor, unread: int) -> tuple[Tensor, Tensor]:
        """Tokens and logits of states ([read, hidden]) after ``unread`` places of which it says nothing."""
        logits = self.model.logits(states)  # [read, draft vocabulary]
        tokens = to_verifier_ids(logits.argmax(-1), self.vocabulary)
        return nn.functional.pad(tokens, (unread, 0), value=-1), nn.functional.pad(logits, (0, 0, unread, 0))


class ShallowTextDrafter(CachedTextDrafter):
    """Drafts one text with a :class:`ShallowModel`.

    Of a prompt it reads the last ``prompt_window`` tokens, as if the text began with them: what comes before it knows
    from the verifier's stream, which has read all. Positions of the row are counted from the first token that is read.

    Args:
        row: the text's row of the model's cache, empty.
        model: what drafts.
        prompt_window: None for the whole prompt.

    Attributes:
        conditions: row i + 1 comes from place i; row 0 is before the text, [capacity + 1, hidden].
        observed: leading positions whose condition a verifier gave.
        skipped: leading positions of the text that are not read; None before the prompt is known.
    """

    def __init__(self, row: CacheRow, model: ShallowModel, prompt_window: int | None = None) -> None:
        super().__init__(row)
        self._model = model
        self._prompt_window = prompt_window
        self.taps = model.shape.taps
        verifier = model.verifier
        shape = (row.shared.capacity + 1, verifier.config.hidden_size)
        self.conditions = torch.zeros(shape, dtype=verifier.dtype, device=verifier.device)
        self.observed = 0
        self.skipped: int | None = None

    def observe(self, start: int, tapped: Tensor) -> None:
        self.observed = start + tapped.shape[0]
        if self.skipped is None:
            # q has read the prompt but for its last token.
            self.skipped = first_read(self.observed + 1, self._prompt_window)
        begin = max(start, self.skipped)  # the first token that is read is taken for that of a text
        self.conditions[begin + 1 : self.observed + 1] = self._model.condition(tapped[begin - start :])
        self.row.rollback(max(start + 1 - self.skipped, 0))  # the slots after read other conditions

    def rollback(self, length: int) -> None:
        super().rollback(max(length - self._skipped, 0))
        self.observed = min(self.observed, length)

    def propose(self, text: Tensor, limit: int, stop: StopRule, pick: Pick) -> Passes[Proposal]:
        if self.skipped is None:
            self.skipped = first_read(text.shape[0], self._prompt_window)
        self.row.rollback(text.shape[0] - 1 - self.skipped)
        unseen = text[self.skipped + self.row.exact :]
        return draft_stepwise(self._advance, unseen, limit, stop, pick, self._model.vocabulary)

    @property
    def _skipped(self) -> int:
        return self.skipped or 0

    def _advance(self, ids: Tensor) -> Passes[Tensor]:
        """Read tokens: at once as far as q has read the place before, one by one after that.

        Only tokens that were drafted otherwise, and not verified, are so far after.
        """
        ready = max(self.observed - self._skipped - self.row.exact, 0) + 1
        logits = yield from self._step(ids[:ready])
        for place in range(ready, len(ids)):
            logits = yield from self._step(ids[place : place + 1])
        return logits

    def _step(self, ids: Tensor) -> Passes[Tensor]:
        slot, width = self.row.exact, ids.shape[0]
        start = self._skipped + slot
        conditions = self.conditions[start : start + width]  # [width, hidden]
        known = max(self.observed - start, 0)  # leading places that a verifier has run on already
        step: StepTensors = yield ShallowStep(self._model, self.row, slot, ids, conditions, known)
        self.conditions[start + known + 1 : start + width + 1] = step.conditions
        self.row.mark_exact(slot + width)
        self.steps += 1
        return step.logits


class UnrolledStore:
    """Keys and values of several passes over one text, so that pass j attends to all passes up to it."""

    def __init__(self) -> None:
        self._keys: dict[int, list[Tensor]] = {}
        self._values: dict[int, list[Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Add this pass's [batch, heads, length, width]; return all passes', [batch, heads, passes * length, width]."""
        self._keys.setdefault(layer, []).append(keys)
        self._values.setdefault(layer, []).append(values)
        return torch.cat(self._keys[layer], 2), torch.cat(self._values[layer], 2)


def unrolled_mask(length: int, passes: int, device: torch.device, sliding: int | None = None) -> Tensor:
    """What a place may read in pass ``passes`` (from 1): bool [1, 1, length, passes * length].

    A token drafted j places after the last verified one reads the slots up to that one with
    the verifier's features (pass 1), and each of the j slots between as when it was drafted
    (Li et al. 2025, EAGLE-3, arXiv 2503.01840, training-time test). A place reads ``sliding`` positions at
    most, its own included; None is no such limit.

    Example:
        >>> unrolled_mask(3, 2, torch.device("cpu")).int()[0, 0].tolist()
        [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]
    """
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    blocks = [key <= query - (passes - 1)]
    blocks += [key == query - (passes - number) for number in range(2, passes + 1)]
    past = readable(key, query, sliding)
    return torch.cat([block & past for block in blocks], 1)[None, None]


def unrolled_states(model: ShallowModel, ids: Tensor, tapped: Tensor, passes: int) -> list[Tensor]:
    """The drafter's states at every place, by how many tokens before were drafted and not verified.

    Args:
        ids: [batch, length].
        tapped: the verifier's residual stream at the drafter's taps, [batch, length, taps, hidden].
        passes: depths to compute.

    Returns:
        For each depth from 0, states [batch, length, hidden].
    """
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device)[None]
    store = UnrolledStore()
    given = model.condition(tapped)  # [batch, length, hidden]
    states: list[Tensor] = []
    for number in range(1, passes + 1):
        conditions = nn.functional.pad(given[:, :-1], (0, 0, 1, 0))  # of the place before: [batch, length, hidden]
        mask_of = partial(unrolled_mask, length, number, ids.device)
        states.append(model(ids, conditions, positions, mask_of, store))
        given = model.own_condition(states[-1])
    return states


@builds(ShallowDraft)
def build_shallow(entry: ShallowDraft, context: DraftContext) -> ShallowDrafter:
    """The drafter of a spec's entry.

    Raises:
        ModelError: its tensors are not of a drafter for this verifier.
    """
    model = load_shallow(context.verifier, entry, context.folder / entry.tensors.path)
    return ShallowDrafter(model, entry.prompt_window)
