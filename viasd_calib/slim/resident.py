"""Bytes that weights take in memory as a backend holds them: what ``--memory`` bounds.

:mod:`viasd_calib.slim.memory` counts another thing, for specs: weights in 16 bits, whatever they are loaded in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from viasd_calib.choices import Backend
from viasd_calib.models.offloaded import LayerWeights, is_without_memory
from viasd_calib.slim.linears import IntegerLinear
from viasd_calib.slim.low_bit import GROUP, Bits, LowBitLinear, rounded_bytes
from viasd_calib.slim.low_bit_kernel import why_no_triton_kernel
from viasd_calib.slim.native.packing import TILE, whole

Holder = Literal["native", "triton", "torch"]
"""Whose order weights in low bits lie in: of the kernels on a CPU, of those on a GPU, or rows as they are."""


def holder_of(backend: Backend, device: torch.device, dtype: torch.dtype) -> Holder:
    """What a backend holds weights in low bits for.

    Example:
        >>> holder_of("eager", torch.device("cpu"), torch.float32)
        'torch'
    """
    if backend == "native":
        return "native"
    return "triton" if why_no_triton_kernel(device, dtype) is None else "torch"


def low_bit_bytes(out: int, inputs: int, bits: Bits, holder: Holder) -> int:
    """Bytes of a weight [out, in] in so many bits with its steps and lowest values, as it is held.

    Kernels take whole groups of inputs, those of a CPU whole tiles of outputs, too.

    Example:
        >>> [low_bit_bytes(60, 60, 4, holder) for holder in ("native", "torch")]
        [2560, 2280]
    """
    if holder == "torch":
        return rounded_bytes(out, inputs, bits)
    groups = whole(inputs, GROUP) // GROUP
    scale = 4  # bytes of a step or a lowest value: float32
    if holder == "native":
        out = whole(out, TILE)
        scales = out if bits == 8 else 2 * out * groups
    else:
        scales = 2 * out * (1 if bits == 8 else groups)
    return out * groups * GROUP * bits // 8 + scales * scale


def slim_bytes(full: nn.Module, slim: Iterable[nn.Module], backend: Backend, holder: Holder) -> int:
    """Bytes of what q' holds beside q, once a backend has prepared both; asked before that.

    A view of q's weights, as of the first neurons of an MLP, takes none where plain weights are run; where a backend
    packs weights it is packed beside q's. ``native`` fills weights up to whole tiles; layers that it joins to one
    product are counted as if each was filled up alone, so that they may take a little less.

    Args:
        full: q.
        slim: what q' has beside q's own modules; a drafter's networks are counted in the same way.

    Example:
        >>> full = nn.Linear(64, 64, bias=False)
        >>> slim_bytes(full, [full, nn.Linear(64, 2, bias=False)], "eager", "torch")
        512
    """
    own = {id(one) for one in (*full.parameters(), *full.buffers())}
    places = {_place(one) for one in (*full.parameters(), *full.buffers())}
    modules = {id(one): one for module in slim for one in module.modules()}.values()
    total = sum(_integer_bytes(one, holder) for one in modules if isinstance(one, IntegerLinear))
    packed: set[int] = set()
    if backend in ("native", "packed"):
        weights = {id(one.weight): one.weight for one in modules if type(one) is nn.Linear}
        packed = weights.keys() - own
        total += sum(_packed_bytes(weights[one], backend) for one in packed)
    others = [one for module in modules for one in _tensors(module) if id(one) not in packed]
    storages = {_place(one): one.untyped_storage().nbytes() for one in others if _place(one) not in places}
    return total + sum(storages.values())


def _integer_bytes(layer: IntegerLinear, holder: Holder) -> int:
    if isinstance(layer, LowBitLinear):
        return low_bit_bytes(layer.out_features, layer.in_features, layer.bits, holder)
    return layer.memory()


def _packed_bytes(weight: Tensor, backend: Backend) -> int:
    out, inputs = weight.shape
    if backend == "native":
        out, inputs = whole(out, TILE), whole(inputs, GROUP)
    return out * inputs * weight.element_size()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers, but for those without values."""
    yield from (one for one in (*module._parameters.values(), *module._buffers.values()) if one is not None)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def other_bytes(model: nn.Module, weights: LayerWeights) -> int:
    """Bytes of q's parameters and buffers beside the weights of linear layers in decoder layers."""
    inside = {_place(one.weight) for one in weights.linears}
    every = [one for one in (*model.parameters(), *model.buffers()) if not is_without_memory(one)]
    return sum({_place(one): one.untyped_storage().nbytes() for one in every if _place(one) not in inside}.values())
