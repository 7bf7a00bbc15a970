"""Rounding what a route has in low bits by GPTQ, on texts that q wrote: whose Hessians, and how many at once.

What enters a sublayer is what enters it in q, at the places where q wrote: q' reads q's cache, and its sublayers in low
bits are to do what q's do. Layers that read the same input share its Hessian.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from viasd_calib.errors import NumericsError, SpecError
from viasd_calib.slim.fused_linear import SIBLINGS
from viasd_calib.slim.gptq import inverse_factor, round_by_factor
from viasd_calib.slim.learned_bits import HEAD, sublayer_name
from viasd_calib.slim.offload.rounded_files import stored_parts
from viasd_calib.slim.parts.adapter import verifier_linears
from viasd_calib.slim.parts.base import FitInputs, WrittenText
from viasd_calib.slim.plan import KINDS, MODULES
from viasd_calib.spec import LowBits, LowBitWeights

TEXTS = 128
"""Texts that Hessians are collected on, drawn from all."""
SEED = 0
"""Of that draw."""
HESSIAN_BYTES = 2**30
"""Memory of the Hessians that one pass over the texts collects, unless a single one takes more. Rounding by one takes
three times its own bytes beside that."""


@dataclass
class SharedInput:
    """An input, what reads it, and its Hessian.

    Attributes:
        words: what it is, for messages.
        reader: the module of q that it enters; None for the output head, whose input is the final norm's output.
        weights: to be rounded, [out, in] each, by their names in a file; of narrow MLPs with the first inputs alone.
        hessian: X^T X, float32, [in, in]: without the factor of 2 that algorithm 1 has, which changes no code.
    """

    words: str
    reader: nn.Module | None
    weights: dict[str, Tensor]
    bits: LowBits
    hessian: Tensor | None = None

    @property
    def inputs(self) -> int:
        """Numbers that enter."""
        return next(iter(self.weights.values())).shape[1]

    def begin(self) -> None:
        """Make room for the Hessian."""
        device = next(iter(self.weights.values())).device
        self.hessian = torch.zeros(self.inputs, self.inputs, device=device)

    def add(self, states: Tensor) -> None:
        """Take what enters at some places: [places, at least in]."""
        assert self.hessian is not None, "begun"
        read = states[:, : self.inputs].float()
        self.hessian.addmm_(read.T, read)

    def rounded(self) -> Iterator[tuple[str, Tensor]]:
        """The integers of its weights, by their names in a file; the Hessian goes.

        Raises:
            NumericsError: the Hessian has no Cholesky factor.
        """
        hessian, self.hessian = self.hessian, None
        assert hessian is not None, "begun"
        try:
            factor = inverse_factor(hessian)
        except NumericsError as error:
            raise NumericsError(
                f"{self.words} cannot be rounded by gptq: {error}; give rounding nearest, or capture other texts"
            ) from error
        del hessian
        for name, weight in self.weights.items():
            for part, tensor in stored_parts(round_by_factor(weight, self.bits, factor)).items():
                yield f"{name}.{part}", tensor


@torch.no_grad()
def learn_rounding(inputs: FitInputs, entry: LowBitWeights) -> dict[str, Tensor]:
    """The integers of the sublayers and the head that an entry names, by their names in a file.

    As many passes over the texts as Hessians are more than :data:`HESSIAN_BYTES`.

    Raises:
        SpecError: there are no texts.
        NumericsError: a Hessian has no Cholesky factor; the sublayer is named.
    """
    refuse_without_texts(inputs)
    texts = random.Random(SEED).sample([*inputs.texts], min(TEXTS, len(inputs.texts)))
    found: dict[str, Tensor] = {}
    for group in _groups(_shared_inputs(inputs, entry)):
        _collect(inputs, group, texts)
        for one in group:
            found.update(one.rounded())
    return found


def refuse_without_texts(inputs: FitInputs) -> None:
    """Refuse to learn from nothing.

    Raises:
        SpecError: there are no texts.
    """
    if not inputs.texts:
        raise SpecError("rounding gptq needs texts that q wrote; give rounding nearest")


def _shared_inputs(inputs: FitInputs, entry: LowBitWeights) -> Iterator[SharedInput]:
    """What enters the linear layers that an entry names, in the order in which q reads it."""
    full = inputs.full
    for layer, (own, slim) in enumerate(zip(full.layers, full.slim_layers, strict=True)):
        for kind in KINDS:
            bits = entry.bits(kind).get(layer)
            if bits is None:
                continue
            readers = {place.path: place.linear for place in verifier_linears(own.get_submodule(MODULES[kind]))}
            weights = {place.path: place.linear.weight for place in verifier_linears(slim.get_submodule(MODULES[kind]))}
            for names in _sharing([*weights]):
                yield SharedInput(
                    f"what enters {', '.join(names)} of layer {layer}",
                    readers[names[0]],
                    {f"{sublayer_name(kind, layer)}.{name}": weights[name] for name in names},
                    bits,
                )
    if entry.head is not None:
        yield SharedInput("the output head", None, {HEAD: full.head_rows()}, entry.head)


def _sharing(names: Sequence[str]) -> Iterator[list[str]]:
    """Names of a sublayer's linear layers, those together that read the same input.

    Example:
        >>> [*_sharing(["gate_proj", "up_proj", "down_proj"])]
        [['gate_proj', 'up_proj'], ['down_proj']]
    """
    of_first = {name: group[0] for group in SIBLINGS for name in group}
    for first in dict.fromkeys(of_first.get(name, name) for name in names):
        yield [name for name in names if of_first.get(name, name) == first]


def _groups(every: Iterator[SharedInput]) -> Iterator[list[SharedInput]]:
    """Inputs in groups whose Hessians are in memory together."""
    group: list[SharedInput] = []
    taken = 0
    for one in every:
        size = 4 * one.inputs**2
        if group and taken + size > HESSIAN_BYTES:
            yield group
            group, taken = [], 0
        group.append(one)
        taken += size
    if group:
        yield group


def _collect(inputs: FitInputs, group: Sequence[SharedInput], texts: Sequence[WrittenText]) -> None:
    """The Hessians of some inputs, in one pass of q over the texts."""
    full, end = inputs.full, len(inputs.full.full_sublayers)
    begin = 0  # of the places of a text where q wrote

    def adding(one: SharedInput) -> None:
        assert one.reader is not None, "a module"
        hook = one.reader.register_forward_pre_hook(lambda _, entering: one.add(entering[0][0, begin:]))
        hooks.callback(hook.remove)

    with ExitStack() as hooks:
        for one in group:
            one.begin()
            if one.reader is not None:
                adding(one)
        for text in texts:
            begin = text.prompt_length - 1
            last = inputs.replay(full, text.ids[None, :-1].to(full.device), [end])[0, begin:, 0]  # [places, hidden]
            for one in group:
                if one.reader is None:
                    one.add(full.final_norm(last))
