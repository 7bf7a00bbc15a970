"""Linear layers with weights of eight or four bits, rounded to nearest, and inputs of sixteen or eight.

A weight of eight bits has one step a row, in either direction from zero; one of four bits a step and a lowest value for
each group of 64 neighbours in a row. Inputs are rounded with one step a *token*, never a tensor: so what a layer
gives for a token depends on no other one. Sixteen bits of an input are two codes of eight, the second of what the first
leaves, so that products of integers serve both. All products are exact sums of integers, times steps; PyTorch's
operators take them in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from viasd_calib.slim.linears import IntegerLinear, plain_linears

GROUP = 64
"""Neighbouring weights of a row that share a step in four bits."""
INPUT_STEPS = 127
"""Codes of an input on either side of zero."""
SMALLEST_STEP = 1e-30
"""Of inputs: a row of smaller numbers is zeros, for its step would have no inverse in float32."""
FINE_STEPS = 254
"""Steps of an input's second code in one of its first."""

WIDENED_BYTES = 2**30
"""Memory that :func:`widened_weights` takes at most."""
WIDENED_AT_ONCE = 2**26
"""Weights that one product reads in float32: a layer with more, as a head of 150,000 tokens, takes several products."""
ROUNDED_AT_ONCE = 2**22
"""Weights that :func:`round_weight` rounds at once: it takes three times their bytes in float32 meanwhile."""

ROUNDING = 1
"""Of :func:`round_weight`: another number for a rule that gives other codes, which were kept by the old one."""

Bits = Literal[8, 4]
InputBits = Literal[16, 8]


class RoundedWeight(NamedTuple):
    """A weight in integers.

    Attributes:
        bits: 8 or 4.
        codes: [out, in], int8: -127 to 127 for 8 bits, 0 to 15 for 4 bits.
        steps: float32, [out, 1] for 8 bits, [out, groups] for 4 bits.
        lowest: the value of code 0, float32, of the shape of ``steps``.
    """

    bits: Bits
    codes: Tensor
    steps: Tensor
    lowest: Tensor

    def plain(self) -> Tensor:
        """The values that the codes stand for: [out, in], float32."""
        if self.bits == 8:
            return self.codes * self.steps
        inputs = self.codes.shape[1]
        steps = self.steps.repeat_interleave(GROUP, 1)[:, :inputs]  # [out, in]
        return self.codes * steps + self.lowest.repeat_interleave(GROUP, 1)[:, :inputs]

    def outputs(self, some: slice) -> RoundedWeight:
        """Some of its outputs, as views.

        Example:
            >>> round_weight(torch.eye(3), 8).outputs(slice(1, 3)).codes.tolist()
            [[0, 127, 0], [0, 0, 127]]
        """
        return RoundedWeight(self.bits, self.codes[some], self.steps[some], self.lowest[some])

    @staticmethod
    def joined(parts: Sequence[RoundedWeight]) -> RoundedWeight:
        """Weights of the same bits and inputs as one, their outputs one after the other; a single one as it is.

        Example:
            >>> weight = round_weight(torch.eye(3), 8)
            >>> RoundedWeight.joined([weight, weight.outputs(slice(1))]).codes[2:].tolist()
            [[0, 0, 127], [127, 0, 0]]
        """
        if len(parts) == 1:
            return parts[0]
        codes, steps, lowest = (torch.cat(own) for own in zip(*(part[1:] for part in parts), strict=True))
        return RoundedWeight(parts[0].bits, codes, steps, lowest)


def round_weight(weight: Tensor, bits: Bits) -> RoundedWeight:
    """A weight [out, in] in 8 or 4 bits: each entry is off by half a step at most.

    Example:
        >>> rounded = round_weight(torch.tensor([[127.0, -3.2]]), 8)
        >>> rounded.codes.tolist(), rounded.steps.tolist()
        ([[127, -3]], [[1.0]])
        >>> round_weight(torch.arange(64.0)[None] / 4.2, 4).codes[0, ::21].tolist()
        [0, 5, 10, 15]
    """
    weight = weight.detach()
    rows = max(1, ROUNDED_AT_ONCE // weight.shape[1])
    return RoundedWeight.joined([_round_rows(some, bits) for some in weight.split(rows)])  # no row knows of another


def _round_rows(weight: Tensor, bits: Bits) -> RoundedWeight:
    weight = weight.float()
    if bits == 8:
        steps = _nonzero(weight.abs().amax(1, keepdim=True) / INPUT_STEPS)
        codes = (weight / steps).round()
        return RoundedWeight(8, codes.to(torch.int8), steps, torch.zeros_like(steps))
    inputs = weight.shape[1]
    filled = torch.cat([weight, weight[:, -1:].expand(-1, -inputs % GROUP)], 1)  # the last weight again: no wider range
    groups = filled.unflatten(1, (-1, GROUP))  # [out, groups, 64]
    lowest, highest = groups.aminmax(dim=-1)  # [out, groups] each
    steps = _nonzero((highest - lowest) / 15)
    codes = ((groups - lowest[..., None]) / steps[..., None]).round().clamp(0, 15)
    return RoundedWeight(4, codes.to(torch.int8).flatten(1)[:, :inputs].contiguous(), steps, lowest)


def in_pairs(codes: Tensor) -> Tensor:
    """Codes of 4 bits [out, in], two to a byte, the first in its low half: [out, in / 2 up to a whole number], uint8.

    Example:
        >>> in_pairs(torch.tensor([[1, 2, 3]])).tolist()
        [[33, 3]]
    """
    codes = nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def out_of_pairs(pairs: Tensor, inputs: int) -> Tensor:
    """The codes [out, in], int8, that :func:`in_pairs` was given.

    Example:
        >>> out_of_pairs(torch.tensor([[33, 3]], dtype=torch.uint8), 3).tolist()
        [[1, 2, 3]]
    """
    both = torch.stack([pairs & 15, pairs >> 4], -1).to(torch.int8).flatten(1)  # [out, in up to an even number]
    return both[:, :inputs].contiguous()


def held_parts(weight: RoundedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, two of 4 bits to a byte, steps, and lowest values where the weight has 4 bits: as it is held."""
    if weight.bits == 8:
        return weight.codes, weight.steps, None
    return in_pairs(weight.codes), weight.steps, weight.lowest


def weight_of(codes: Tensor, steps: Tensor, lowest: Tensor | None, inputs: int) -> RoundedWeight:
    """The weight of so many inputs that :func:`held_parts` was given.

    Example:
        >>> weight = round_weight(torch.randn(3, 5), 4)
        >>> torch.equal(weight_of(*held_parts(weight), 5).codes, weight.codes)
        True
    """
    if lowest is None:
        return RoundedWeight(8, codes, steps, torch.zeros_like(steps))
    return RoundedWeight(4, out_of_pairs(codes, inputs), steps, lowest)


def rounded_bytes(out: int, inputs: int, bits: Bits) -> int:
    """Bytes of a weight [out, in] in so many bits, with its steps and, for 4 bits, lowest values.

    Example:
        >>> rounded_bytes(64, 64, 8), rounded_bytes(64, 64, 4)
        (4352, 2560)
    """
    scales = out * 4 if bits == 8 else out * -(-inputs // GROUP) * 8
    return out * -(-inputs * bits // 8) + scales


def _nonzero(steps: Tensor) -> Tensor:
    """Steps; weights that are all alike have one too."""
    return torch.where(steps > 0, steps, 1.0)


class RoundedInputs(NamedTuple):
    """Inputs in one code or two: ``codes[i] * steps[i]``, summed over i, is near them.

    Attributes:
        codes: [planes, rows, in], whole numbers from -127 to 127 in float32.
        steps: [planes, rows, 1].
    """

    codes: Tensor
    steps: Tensor


def round_inputs(inputs: Tensor, bits: InputBits) -> RoundedInputs:
    """Inputs [rows, in] in 16 or 8 bits, with a step for each row.

    Example:
        >>> codes, steps = round_inputs(torch.tensor([[127.0, 1.5]]), 16)
        >>> (codes * steps).sum(0).tolist()
        [[127.0, 1.5]]
    """
    inputs = inputs.float()
    asked = inputs.abs().amax(1, keepdim=True) / INPUT_STEPS  # [rows, 1]
    step = torch.where(asked < SMALLEST_STEP, 1.0, asked)  # what is no number stays none
    codes = (inputs * (1 / step)).round()  # as kernels do, which divide once a row
    if bits == 8:
        return RoundedInputs(codes[None], step[None])
    fine = step / FINE_STEPS
    rest = ((inputs - codes * step) * (1 / fine)).round()
    return RoundedInputs(torch.stack([codes, rest]), torch.stack([step, fine]))


class LowBitLinear(IntegerLinear):
    """A linear layer whose weight is integers, on any device: PyTorch's own operators, one row as another.

    It shows what a layer gives, and is no faster than a plain one; a backend puts its own kernels into its place
    (:mod:`viasd_calib.slim.native`). Weights are rounded when it is made, and the plain weight is not held. What is
    trained below it is trained as if inputs were not rounded: a step has no slope.

    Args:
        linear: what it is made from.
        bits: of a weight.
        input_bits: of an input.
        rounded: what its weight comes to in these bits, where that is known; the plain one is then not read.

    Example:
        >>> layer = LowBitLinear(nn.Linear(64, 16), 8)
        >>> layer(torch.ones(2, 3, 64)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self, linear: nn.Linear, bits: Bits, input_bits: InputBits = 16, rounded: RoundedWeight | None = None
    ) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.input_bits: InputBits = input_bits
        self.bits = bits
        rounded = round_weight(linear.weight, bits) if rounded is None else rounded
        self._codes, self._steps, self._lowest = held_parts(rounded)
        self.bias = linear.bias
        self.cost_key = bits, input_bits
        self._widened: Sequence[Tensor] | None = None

    @property
    def rounded(self) -> RoundedWeight:
        """Its weight; codes of 4 bits, which are held two to a byte, are taken apart anew."""
        return weight_of(self._codes, self._steps, self._lowest, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the number format of the inputs."""
        rows = inputs.reshape(-1, self.in_features)  # [rows, in]
        codes, steps = round_inputs(rows, self.input_bits)
        rounded = (codes * steps).sum(0)  # [rows, in]: one product for both codes, off by a rounding of float32
        if torch.is_grad_enabled() and inputs.requires_grad:  # straight through: Bengio et al. 2013, arXiv 1308.3432
            rounded = rows.float() + (rounded - rows.float()).detach()
        parts = [rounded @ part for part in self._weights()]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # [rows, out]
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)

    def _weights(self) -> Iterable[Tensor]:
        """The values of the codes, float32, [in, some outputs] each: those that are held, else made anew."""
        return self._made() if self._widened is None else self._widened

    def _made(self) -> Iterator[Tensor]:
        """One part after the other, so that no more than one has to be in memory."""
        rows = max(1, WIDENED_AT_ONCE // self.in_features)
        for begin in range(0, self.out_features, rows):
            some = slice(begin, begin + rows)
            lowest = None if self._lowest is None else self._lowest[some]
            yield weight_of(self._codes[some], self._steps[some], lowest, self.in_features).plain().T

    def hold_widened(self, held: bool) -> None:
        """Hold the weight in float32 from now on, or no longer."""
        self._widened = [*self._made()] if held else None

    def memory(self) -> int:
        """Bytes of the weight with its steps."""
        return rounded_bytes(self.out_features, self.in_features, self.bits)


def round_linears(modules: Iterable[nn.Module], bits: Bits, input_bits: InputBits = 16) -> None:
    """Exchange, in place, every linear layer inside ``modules`` for one with a weight of integers."""
    for place in plain_linears(modules):
        place.put(LowBitLinear(place.linear, bits, input_bits))


@contextmanager
def widened_weights(modules: Iterable[nn.Module], limit: int = WIDENED_BYTES) -> Iterator[None]:
    """Within it, low-bit layers hold their weights in float32: many passes widen them once, and give the same bits.

    Args:
        modules: whose layers hold them.
        limit: bytes; layers whose weights do not fit beside those before them widen them at each pass, as ever.

    Example:
        >>> layer, inputs = LowBitLinear(nn.Linear(64, 16), 8), torch.ones(1, 64)
        >>> with widened_weights([layer]):
        ...     held = layer(inputs)
        >>> torch.equal(held, layer(inputs))
        True
    """
    layers = {layer: None for module in modules for layer in module.modules() if isinstance(layer, LowBitLinear)}
    left, held = limit, []
    try:
        for layer in layers:
            size = 4 * layer.in_features * layer.out_features
            if size <= left:
                left -= size
                layer.hold_widened(True)
                held.append(layer)
        yield
    finally:
        for layer in held:
            layer.hold_widened(False)
