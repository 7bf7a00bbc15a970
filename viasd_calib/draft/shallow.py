"""A shallow drafter: a few of the verifier's layers, conditioned on its last hidden state.

The drafter reads, at each place, the token and the verifier's last hidden state of the place before
(Li et al. 2024, EAGLE, arXiv 2401.15077, section 4.1), and falls back on its own state where no
verifier has run. Its output is restricted to the verifier's most frequent tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedConfig

from viasd_calib.draft.base import Drafter, Proposal, StopRule, to_verifier_ids
from viasd_calib.errors import ModelError
from viasd_calib.files import write_bytes
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.families import AttentionInputs, KeyValueStore
from viasd_calib.slim.forward import RoutedModel, sublayers_of


@dataclass(frozen=True)
class ShallowShape:
    """Sizes of a shallow drafter."""

    num_layers: int
    head_vocab: int


def draft_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The verifier's configuration with ``num_layers`` decoder layers."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = num_layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:num_layers]
    return shallow


class ShallowModel(nn.Module):
    """The drafter's trainable part; embeddings and rotary tables are the verifier's, held by reference.

    Args:
        verifier: the opened verifier whose layers' shape is copied.
        shape: layers and output vocabulary.
        init_from: verifier layers that the drafter's begin as; one index for each.
    """

    vocabulary: Tensor
    feature_size: Tensor

    def __init__(self, verifier: RoutedModel, shape: ShallowShape, init_from: Sequence[int] | None = None) -> None:
        super().__init__()
        indices = list(init_from) if init_from is not None else [0] * shape.num_layers
        if len(indices) != shape.num_layers:
            raise ModelError(f"{shape.num_layers} layers need as many indices to begin from, not {len(indices)}")
        hidden = verifier.config.hidden_size
        self.shape = shape
        self.config = draft_config(verifier.config, shape.num_layers)
        self.layers = nn.ModuleList(_own_layer(verifier.layers[index], slot) for slot, index in enumerate(indices))
        self.fuse = nn.Linear(2 * hidden, hidden, bias=False)
        self.norm = copy.deepcopy(verifier.final_norm_module)
        self.head = nn.Linear(hidden, shape.head_vocab, bias=False)
        self.register_buffer("vocabulary", torch.arange(shape.head_vocab))
        # Features are brought to the embeddings' size, or they would drown the token at the start of training.
        self.register_buffer("feature_size", verifier.embedding_size())
        self._verifier = [verifier]  # in a list, so that its weights are not counted as the drafter's
        self.requires_grad_(True)
        with torch.no_grad():
            self.fuse.weight.zero_()
            self.fuse.weight[:, :hidden].fill_diagonal_(1.0)
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

    def forward(
        self, ids: Tensor, features: Tensor, positions: Tensor, mask: Tensor | None, store: KeyValueStore
    ) -> Tensor:
        """States of the drafter, after its norm: [batch, width, hidden].

        Args:
            ids: tokens, [batch, width].
            features: the hidden state of the place *before* each token, [batch, width, hidden].
            positions: [1 or batch, width].
        """
        embedded = self.verifier.embed(ids)  # [batch, width, hidden]
        scaled = nn.functional.rms_norm(features, features.shape[-1:], eps=1e-6) * self.feature_size
        hidden = self.fuse(torch.cat([embedded, scaled], -1))  # [batch, width, hidden]
        inputs: AttentionInputs = self.verifier.attention_inputs(hidden, positions, mask, store)
        for sublayer in sublayers_of(self.layers):
            hidden = hidden + self.verifier.step(sublayer, hidden, inputs)
        return self.norm(hidden)  # type: ignore[no-any-return]


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
        kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: tensor.to(kinds[name]) for name, tensor in tensors.items()})
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path} is not a shallow drafter for this verifier: {reason}") from error
    return model.eval().requires_grad_(False)


class ShallowDrafter(Drafter):
    """Drafts with a :class:`ShallowModel`, following the verifiers' hidden states."""

    def __init__(self, model: ShallowModel) -> None:
        self.model = model
        self.vocabulary = model.vocabulary
        self._cache: SharedCache | None = None
        self._features = torch.empty(0)
        self._observed = 0  # leading positions whose feature a verifier gave

    def start(self, capacity: int) -> None:
        verifier = self.model.verifier
        self.steps = 0
        self._observed = 0
        self._cache = SharedCache(self.model.config, capacity, dtype=verifier.dtype, device=verifier.device)
        width = verifier.config.hidden_size
        # Row i + 1 is the state after token i; row 0 stands before the text.
        self._features = torch.zeros(capacity + 1, width, dtype=verifier.dtype, device=verifier.device)

    @property
    def cache(self) -> SharedCache:
        """The drafter's own cache."""
        assert self._cache is not None, "start comes first"
        return self._cache

    def observe(self, start: int, hidden: Tensor) -> None:
        self._features[start + 1 : start + 1 + hidden.shape[0]] = hidden
        self._observed = start + hidden.shape[0]
        self.cache.rollback(start + 1)  # the slots behind read other features

    def rollback(self, length: int) -> None:
        self._observed = min(self._observed, length)
        self.cache.rollback(length)

    def propose(self, text: Tensor, limit: int, stop: StopRule) -> Proposal:
        tokens: list[Tensor] = []
        rows: list[Tensor] = []
        self.cache.rollback(text.shape[0] - 1)
        unseen = text[self.cache.exact :]  # [unseen]
        while len(tokens) < limit:
            logits = self._advance(unseen)  # [draft vocabulary]
            unseen = to_verifier_ids(logits.argmax(-1, keepdim=True), self.vocabulary)  # [1]
            tokens.append(unseen)
            rows.append(logits)
            if stop(logits, len(tokens) - 1):
                break
        if not tokens:
            return Proposal(text[:0], None)
        return Proposal(torch.cat(tokens), torch.stack(rows))

    def _advance(self, ids: Tensor) -> Tensor:
        start, width = self.cache.exact, ids.shape[0]
        window = CacheWindow(self.cache, start, width, start + width)
        features = self._features[start : start + width]  # [width, hidden]
        states = self.model(ids[None], features[None], window.positions(), window.mask(), window)[0]  # [width, hidden]
        known = max(self._observed, start) - start  # of the new states, those a verifier has given already
        self._features[start + known + 1 : start + width + 1] = states[known:]
        self.cache.mark_exact(start + width)
        self.steps += 1
        return self.model.head(states[-1])  # type: ignore[no-any-return]

    def score(self, text: Tensor, hidden: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        states = unrolled_states(self.model, text[None], hidden[None], int(depth.max()) + 1)
        picked = torch.stack(states)[depth, 0, torch.arange(text.shape[0], device=text.device)]  # [length, hidden]
        logits = self.model.head(picked)  # [length, draft vocabulary]
        return to_verifier_ids(logits.argmax(-1), self.vocabulary), logits


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


def unrolled_mask(length: int, passes: int, device: torch.device) -> Tensor:
    """What a place may read in pass ``passes`` (from 1): bool [1, 1, length, passes * length].

    A token drafted j places after the last verified one reads the slots up to that one as they stand with
    the verifier's features (pass 1), and each of the j slots between as it stood when it was drafted
    (Li et al. 2025, EAGLE-3, arXiv 2503.01840, training-time test).

    Example:
        >>> unrolled_mask(3, 2, torch.device("cpu")).int()[0, 0].tolist()
        [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]
    """
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    blocks = [key <= query - (passes - 1)]
    blocks += [key == query - (passes - number) for number in range(2, passes + 1)]
    return torch.cat(blocks, 1)[None, None]


def unrolled_states(model: ShallowModel, ids: Tensor, hidden: Tensor, passes: int) -> list[Tensor]:
    """The drafter's states at every place, by how many tokens before were drafted and not verified.

    Args:
        ids: [batch, length].
        hidden: the verifier's last hidden states, [batch, length, hidden].
        passes: depths to compute.

    Returns:
        For each depth from 0, states [batch, length, hidden].
    """
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device)[None]
    store = UnrolledStore()
    source = hidden
    states: list[Tensor] = []
    for number in range(1, passes + 1):
        features = nn.functional.pad(source[:, :-1], (0, 0, 1, 0))  # the place before: [batch, length, hidden]
        mask = unrolled_mask(length, number, ids.device)
        source = model(ids, features, positions, mask, store)
        states.append(source)
    return states
