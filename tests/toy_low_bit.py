"""A part of a route in one file that runs linear layers otherwise: copies of 8 bits, of what other parts left there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from viasd_calib.slim.linears import plain_linears
from viasd_calib.slim.parts.base import FitInputs, PartOptions, RoutePart, Sizes, register
from viasd_calib.slim.parts.head_vocab import SlimHead
from viasd_calib.slim.plan import SlimPlan, share_parameters
from viasd_calib.spec import PartEntry, Route


class LowBitOptions(PartOptions):
    """Sublayers by number, as :class:`~viasd_calib.slim.parts.skips.SkippedRun` has them; their count is the head."""

    sublayers: tuple[int, ...]


class LowBitEntry(PartEntry):
    """The same in a spec; there are no tensors: copies are made of q's own weights."""

    sublayers: tuple[int, ...]


class ByteLinear(nn.Module):
    """A linear layer whose weight is rounded to 8 bits, with a scale for each row."""

    weight: Tensor
    scale: Tensor
    cost_key = "8 bits"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127  # [out, 1]
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale, self.bias)


@register
class LowBit(RoutePart[tuple[int, ...]]):
    """Sublayers whose linear layers have 8 bits."""

    name = "low_bit"
    title = "linear layers of 8 bits"
    contents = "which"
    entry = LowBitEntry
    options = LowBitOptions
    last = True

    def fit(self, inputs: FitInputs, options: PartOptions) -> tuple[int, ...]:
        assert isinstance(options, LowBitOptions)
        return options.sublayers

    def save(self, held: tuple[int, ...], route: Route, folder: Path, options: PartOptions) -> LowBitEntry:
        return LowBitEntry(sublayers=held)

    def load(self, route: Route, folder: Path, sizes: Sizes) -> tuple[int, ...]:
        entry = route.entries()[self.name]
        assert isinstance(entry, LowBitEntry)
        return entry.sublayers

    def install(self, plan: SlimPlan, held: tuple[int, ...]) -> None:
        layers = nn.ModuleList(share_parameters(layer) for layer in plan.layers)
        plan.layers = layers
        for number in held:
            if number == 2 * len(layers):
                every = torch.arange(plan.full.config.vocab_size, device=plan.full.device)
                exchanged: nn.Module = plan.head or SlimHead(plan.full.head_rows(every), every)
                plan.head = exchanged
            else:
                exchanged = layers[number // 2].get_submodule(("self_attn", "mlp")[number % 2])
            for place in plain_linears([exchanged]):
                place.put(ByteLinear(place.linear))
