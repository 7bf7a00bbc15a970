"""Linear layers that the kernels run, in 16, 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.slim.fused_linear import SIBLINGS, joint_bias, put_product
from viasd_calib.slim.linears import PackedLinear
from viasd_calib.slim.low_bit import InputBits, LowBitLinear, RoundedWeight
from viasd_calib.slim.native.library import LinearStruct
from viasd_calib.slim.native.packing import (
    PackedWeight,
    pack_bfloat16,
    pack_bias,
    pack_rounded,
    pointer_to,
    unpack_bfloat16,
)
from viasd_calib.slim.native.team import call

FREED = 2**25
"""Bytes of codes after whose packing freed memory is given back: gaps that they leave took three times as much."""


class NativeLinear(PackedLinear):
    """A linear layer in the kernels' order; what it gives for a row depends on no other row, bit for bit.

    Args:
        packed: the weight.
        bias: [out], or None.
        input_bits: of inputs, beside a weight of 8 or 4 bits.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None, input_bits: InputBits = 16) -> None:
        super().__init__()
        self.packed = packed
        self.input_bits = input_bits
        self.out_features, self.in_features = packed.shape
        self.bias = pack_bias(bias)
        self.cost_key = packed.bits, input_bits
        self._struct = self.struct()

    def struct(self, tile_pairs: bool = False) -> LinearStruct:
        """What the kernels are told of the layer."""
        return self.packed.struct(self.bias, tile_pairs, self.input_bits)

    def plain(self) -> Tensor:
        """The weight of a layer in 16 bits: [out, in], bfloat16, put together anew."""
        return unpack_bfloat16(self.packed)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the number format of the inputs."""
        rows = inputs.reshape(-1, self.in_features).float().contiguous()  # [rows, in]
        rows = nn.functional.pad(rows, (0, -self.in_features % 16)) if self.in_features % 16 else rows
        narrowed = inputs.dtype == torch.bfloat16
        out = torch.empty(rows.shape[0], self.out_features, dtype=torch.bfloat16 if narrowed else torch.float32)
        call(
            "viasd_linear",
            *(pointer_to(self._struct), rows.data_ptr(), rows.shape[1], rows.shape[0], None, 0.0),
            *(out.data_ptr(), int(narrowed), self.out_features),
        )
        return out.to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)  # [..., out]


def native_linear(weight: Tensor, bias: Tensor | None) -> NativeLinear:
    """A layer in bfloat16, from a weight [out, in]."""
    return NativeLinear(pack_bfloat16(weight), bias)


def pack_low_bits(modules: Iterable[nn.Module]) -> None:
    """Exchange, in place, every :class:`LowBitLinear` inside ``modules`` for one that the kernels run.

    Those of a module that read the same input (:data:`SIBLINGS`) become parts of one product.
    """
    freed = 0
    for module in modules:
        # Not the layers themselves: held in a list, their codes would stay beside the packed ones until the last.
        for holder in [one for one in module.modules() if type(one) is not LowBitLinear]:
            children = {name: child for name, child in holder.named_children() if type(child) is LowBitLinear}
            freed += sum(child.memory() for child in children.values())
            for names in SIBLINGS:
                layers = [children[name] for name in names if name in children]
                if len(layers) < len(names) or len({(layer.bits, layer.input_bits) for layer in layers}) > 1:
                    continue
                put_product(holder, names, _joined(layers), [layer.out_features for layer in layers])
                children = {name: child for name, child in children.items() if name not in names}
            for name, layer in children.items():
                setattr(holder, name, _joined([layer]))
            if freed >= FREED:
                give_freed_memory_back()
                freed = 0


def _joined(layers: Sequence[LowBitLinear]) -> NativeLinear:
    """Layers of the same bits as one, their outputs one after the other."""
    weight = RoundedWeight.joined([layer.rounded for layer in layers])
    bias = joint_bias([layer.bias for layer in layers], [layer.out_features for layer in layers])
    return NativeLinear(pack_rounded(weight), bias, layers[0].input_bits)
