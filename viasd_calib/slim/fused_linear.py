"""Linear layers that read the same input, as slices of one product.

A product has a fixed cost beside its arithmetic, which is much of its time where a pass has few tokens. A module's
layers are called one after another on the same tensor: the first call makes the product for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from viasd_calib.slim.lora_linear import LoRALinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of a module's layers that its forward calls on one and the same input, in the families known here."""


def siblings_in(parent: nn.Module) -> list[list[nn.Linear]]:
    """The groups of linear layers inside a module that read the same input: its own, and those of their adapters.

    All of a group are plain, of one input size and number format; its own are all there, else they are none.

    Example:
        >>> mlp = nn.ModuleDict(
        ...     {"gate_proj": nn.Linear(2, 3), "up_proj": nn.Linear(2, 3), "down_proj": nn.Linear(3, 2)}
        ... )
        >>> [[layer.out_features for layer in group] for group in siblings_in(mlp)]
        [[3, 3]]
    """
    children = dict(parent.named_children())
    groups = []
    for names in SIBLINGS:
        present = [children[name] for name in names if name in children]
        own = [child for child in present if type(child) is nn.Linear]
        adapters = [child.down for child in present if type(child) is LoRALinear]
        groups += [own] if len(own) == len(names) else []
        groups += [adapters] if len(adapters) > 1 else []
    return [group for group in groups if len({(layer.in_features, layer.weight.dtype) for layer in group}) == 1]


def put_product(
    holder: nn.Module, names: Sequence[str], linear: Callable[[Tensor], Tensor], sizes: Sequence[int]
) -> None:
    """Put parts of one product into the places of a module's layers that read the same input.

    Args:
        names: of the layers, in the order of their outputs.
        linear: [..., in] -> [..., sum of sizes].
        sizes: output features of each.
    """
    product = FusedLinear(linear, sizes)
    for number, name in enumerate(names):
        setattr(holder, name, FusedLinearPart(product, number))


def joint_bias(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Biases of layers, one after the other, zero for a layer that has none; None where none has: [sum of sizes].

    Example:
        >>> joint_bias([None, torch.ones(2)], [3, 2]).tolist()
        [0.0, 0.0, 0.0, 1.0, 1.0]
    """
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    every = zip(biases, sizes, strict=True)
    return torch.cat([given.new_zeros(size) if bias is None else bias.detach() for bias, size in every])


class _Made(NamedTuple):
    """A product and what it was made of; parts leave as they are taken."""

    inputs: Tensor
    parts: dict[int, Tensor]


class FusedLinear:
    """One product for several layers; keeps what its siblings have not taken yet, and nothing after that.

    A part is kept for the very tensor object that the product was made of, which is held until then so that no other
    can take its identity. The tensor may not be changed in place between the calls of siblings. Layers may be called
    in any order, any number of times and by themselves: a part that is not there is made anew. So it is where several
    threads are here at the same time, each with a tensor of its own.

    Args:
        linear: [..., in] -> [..., sum of sizes].
        sizes: output features of each layer.

    Example:
        >>> product = FusedLinear(nn.Linear(2, 5), [3, 2])
        >>> inputs = next(nn.Linear(2, 1).parameters())
        >>> product.part(1, inputs).shape, product.part(0, inputs).shape
        (torch.Size([1, 2]), torch.Size([1, 3]))
    """

    def __init__(self, linear: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> None:
        self.linear = linear
        self.sizes = list(sizes)
        self._made: _Made | None = None

    def part(self, number: int, inputs: Tensor) -> Tensor:
        """Output of layer ``number``: [..., in] -> [..., sizes[number]], a view of the product."""
        made = self._made
        taken = made.parts.pop(number, None) if made is not None and made.inputs is inputs else None
        if made is None or taken is None:
            made = self._made = _Made(inputs, dict(enumerate(self.linear(inputs).split_with_sizes(self.sizes, -1))))
            taken = made.parts.pop(number)
        if not made.parts:
            self._made = None
        return taken


class FusedLinearPart(nn.Module):
    """What takes the place of one layer of a :class:`FusedLinear`."""

    def __init__(self, product: FusedLinear, number: int) -> None:
        super().__init__()
        self.product = product
        self.number = number

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product.part(self.number, inputs)
