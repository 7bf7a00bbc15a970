"""Steps of a shallow drafter by the compiled kernels: one call a step, for a single text on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from viasd_calib.slim.native.library import DrafterStruct, LinearStruct
from viasd_calib.slim.native.linear import NativeLinear
from viasd_calib.slim.native.model import NativeModel
from viasd_calib.slim.native.packing import pointer_to
from viasd_calib.slim.native.stack import NativeStack, cache_struct, runs
from viasd_calib.slim.native.team import call

if TYPE_CHECKING:
    from viasd_calib.draft.shallow import ShallowModel
    from viasd_calib.slim.cache import CacheWindow

UNIT_EPSILON = 1e-6
"""Of the norm that brings states to root mean square 1."""


class StepTensors(NamedTuple):
    """What a step gives.

    Attributes:
        logits: after the last token, [draft vocabulary], bfloat16.
        conditions: for the places after those that no verifier has run on, [width - known, hidden], bfloat16.
    """

    logits: Tensor
    conditions: Tensor


class NativeSteps:
    """What the kernels need to know of a drafter whose linear layers are theirs.

    Args:
        model: the drafter.
        verifier: its verifier, of backend ``native``.
    """

    def __init__(self, model: ShallowModel, verifier: NativeModel) -> None:
        self._verifier = verifier
        self._stack = NativeStack(model.config, model.sublayers)
        self._kind = model.sublayers[0].layer_type
        hidden = verifier.config.hidden_size
        embeddings: Tensor = verifier.model.get_input_embeddings().weight  # type: ignore[assignment]
        norm = model.norm.weight.detach().float().contiguous()  # type: ignore[operator]
        ones = torch.ones(hidden)
        linears = (model.from_token, model.from_own, model.head)
        self._kept = embeddings, norm, ones, linears  # what the struct points to
        self._vocabulary, self._hidden = model.shape.head_vocab, hidden
        self._struct = DrafterStruct(
            *(_struct_of(linear) for linear in linears),
            *(embeddings.data_ptr(), norm.data_ptr(), ones.data_ptr()),
            *(float(model.token_size), verifier.config.rms_norm_eps, UNIT_EPSILON),
        )

    def step(self, ids: Tensor, conditions: Tensor, known: int, window: CacheWindow) -> StepTensors:
        """Run tokens ([width], long) with their conditions ([width, hidden], bfloat16).

        Args:
            known: leading places that a verifier has run on.
            window: of the drafter's cache, over these tokens of a single text.
        """
        width, start = len(ids), window.start
        assert isinstance(start, int), "a single text starts at one place"
        cosine, sine = self._verifier.rotary_at(self._kind, start, width)
        ids, conditions = ids.contiguous(), conditions.contiguous()
        stream = torch.empty(width, self._hidden)
        logits = torch.empty(self._vocabulary, dtype=torch.bfloat16)
        own = torch.empty(width - known, self._hidden, dtype=torch.bfloat16)
        cache = cache_struct(window.cache.keys, window.cache.values)
        call(
            "viasd_draft",
            *(pointer_to(self._struct), *self._stack.pointers, pointer_to(cache), width, start),
            *(ids.data_ptr(), conditions.data_ptr(), known, stream.data_ptr(), cosine.data_ptr(), sine.data_ptr()),
            *(logits.data_ptr(), self._vocabulary, own.data_ptr()),
        )
        return StepTensors(logits, own)


def _struct_of(linear: object) -> LinearStruct:
    assert isinstance(linear, NativeLinear), "native_steps was asked before"
    return linear.struct()


def native_steps(model: ShallowModel) -> NativeSteps | None:
    """What runs a drafter's steps; None where the kernels do not: modules do then."""
    verifier = model.verifier
    linears = (model.from_token, model.from_own, model.head)
    known = isinstance(verifier, NativeModel) and all(runs(one) for one in model.sublayers)
    if not known or not all(isinstance(linear, NativeLinear) for linear in linears):
        return None
    return NativeSteps(model, verifier)  # type: ignore[arg-type]
