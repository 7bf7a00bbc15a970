"""Linear layers whose weights lie in the order that oneDNN's kernels read on a CPU.

PyTorch keeps a linear layer's weight row by row, and in bfloat16 puts it into the order of its kernel anew in
each call, which takes longer than the product itself where a pass has few tokens. Here that is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from viasd_calib.errors import ModelError
from viasd_calib.slim.fused_linear import FusedLinear, FusedLinearPart, joint_bias, siblings_in
from viasd_calib.slim.linears import LinearPlace, PackedLinear, StreamedLinear, plain_linears

TYPICAL_WIDTH = 8
"""Rows of a product that the order is chosen for: the tokens of a verifying pass."""

_Key = tuple[int, int]
"""A layer by its weight and its bias: what tells whether two layers are one."""

_OPS = torch.library.Library("viasd_calib", "FRAGMENT")
_OPS.define("packed_linear(Tensor inputs, int handle, int out) -> Tensor")
_handles = count()
_by_handle: WeakValueDictionary[int, OneDNNLinear] = WeakValueDictionary()


@torch.library.impl(_OPS, "packed_linear", "CPU")
def _packed_linear(inputs: Tensor, handle: int, _out: int) -> Tensor:
    return _by_handle[handle].product(inputs)


@torch.library.register_fake("viasd_calib::packed_linear", lib=_OPS)  # type: ignore[untyped-decorator]
def _shape_of_packed_linear(inputs: Tensor, _handle: int, out: int) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], out))


class OneDNNLinear(PackedLinear):
    """A linear layer in oneDNN's own order; gives what the layer it was made from gives, up to rounding.

    Args:
        weight: in oneDNN's order, as :func:`pack_weight` gives it.
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight = weight
        self._out: int = weight.shape[0]
        self.bias = bias
        self._handle = next(_handles)
        _by_handle[self._handle] = self

    @property
    def weight(self) -> Tensor:
        """The weight in oneDNN's order: its type, shape and device can be asked, its values cannot (:meth:`plain`)."""
        return self._weight

    def plain(self) -> Tensor:
        """The weight in plain order, [out, in], put together anew."""
        return self._weight.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if torch.compiler.is_compiling():  # a graph cannot hold a weight in oneDNN's order, but a number that finds it
            traced: Tensor = torch.ops.viasd_calib.packed_linear(inputs, self._handle, self._out)
            return traced
        return self.product(inputs)

    def product(self, inputs: Tensor) -> Tensor:
        """The same, by oneDNN itself."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self.bias, "none", [], "")
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights can be packed: on a CPU that calculates in ``dtype``, by a PyTorch that was built with oneDNN."""
    return why_not_packed(device, dtype) is None


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str | None:
    """What packing lacks on this machine, in words; None where nothing is lacking.

    The operators are PyTorch's private ones, and differ between its builds (there are none for Macs): they are tried.
    """
    if device.type != "cpu":
        return f"device {device} is no CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is none of its number formats"
    if not torch.backends.mkldnn.is_available():
        return f"PyTorch {torch.__version__} is built without oneDNN here"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no instructions for bfloat16 (AVX-512 or AMX on x86, BF16 on ARM)"
        if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return "this CPU has no instructions for float16"
    except (AttributeError, RuntimeError) as error:
        return f"PyTorch {torch.__version__} cannot say whether this CPU has instructions for {dtype} ({error})"
    return trial_product(dtype)


@cache
def trial_product(dtype: torch.dtype) -> str | None:
    """What goes wrong in a small product of packed weights, in words; None where it is right."""
    try:
        product = OneDNNLinear(pack_weight(torch.ones(4, 4, dtype=dtype)), None).product(torch.ones(1, 4, dtype=dtype))
    except (AttributeError, RuntimeError) as error:  # no such operator, or none for this CPU
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"PyTorch {torch.__version__} cannot do it here ({reason})"
    right = torch.equal(product.float(), torch.full((1, 4), 4.0))
    return None if right else f"PyTorch {torch.__version__} calculates wrongly with it here"


def pack_weight(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's order: an opaque tensor that its linear kernels take."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_WIDTH)  # type: ignore[no-any-return]


def refuse_packed(model: nn.Module) -> None:
    """Refuse to put parts into a model whose weights are packed already.

    Raises:
        ModelError: naming the mend.
    """
    if any(isinstance(module, (PackedLinear, StreamedLinear)) for module in model.modules()):
        raise ModelError("the verifier's weights are packed or read for another decoder; load it anew for this spec")


def packed_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear layer in oneDNN's order, from a weight [out, in]."""
    return OneDNNLinear(pack_weight(weight), bias)


def pack_linears(
    modules: Iterable[nn.Module], pack: Callable[[Tensor, Tensor | None], nn.Module] = packed_linear
) -> None:
    """Exchange, in place, every linear layer inside ``modules`` for a packed one.

    Layers that share a weight share its packed form, so that q and q' still hold one copy between them, and a
    plain weight is freed once nobody else holds it. Those that read the same input (:func:`siblings_in`) become parts
    of one product. The modules can no longer be trained or saved.

    Args:
        pack: makes the packed layer of a weight and a bias.

    Example:
        >>> layer = nn.Sequential(nn.Linear(3, 2))
        >>> inputs = torch.ones(1, 3)
        >>> before = layer(inputs)
        >>> pack_linears([layer])
        >>> type(layer[0]).__name__, torch.allclose(layer(inputs), before)
        ('OneDNNLinear', True)
    """
    modules = tuple(modules)
    groups = [group for module in modules for holder in module.modules() for group in siblings_in(holder)]
    of_a_group = {id(layer) for group in groups for layer in group}
    alone: dict[_Key, list[LinearPlace[nn.Linear]]] = {}
    in_group: dict[int, LinearPlace[nn.Linear]] = {}
    for place in plain_linears(modules):
        if id(place.linear) in of_a_group:
            in_group[id(place.linear)] = place
        else:
            alone.setdefault(_key(place.linear), []).append(place)
    products: dict[tuple[_Key, ...], FusedLinear] = {}
    groups.reverse()
    while groups:
        group = groups.pop()
        keys = tuple(_key(layer) for layer in group)
        if keys not in products:
            products[keys] = _joint_product(group, pack)
        for number, (key, layer) in enumerate(zip(keys, group, strict=True)):
            for place in [*alone.pop(key, ()), in_group.pop(id(layer))]:
                place.put(FusedLinearPart(products[keys], number))
    while alone:
        _, same = alone.popitem()
        packed = pack(same[0].linear.weight, same[0].linear.bias)
        for place in same:
            place.put(packed)


def _joint_product(layers: Sequence[nn.Linear], pack: Callable[[Tensor, Tensor | None], nn.Module]) -> FusedLinear:
    sizes = [layer.out_features for layer in layers]
    return FusedLinear(pack(_joint_weight(layers), joint_bias([layer.bias for layer in layers], sizes)), sizes)


def _key(linear: nn.Linear) -> _Key:
    return id(linear.weight), id(linear.bias)


def _joint_weight(layers: Sequence[nn.Linear]) -> Tensor:
    """The weights of layers that read the same input, one below the other: [sum of out, in]."""
    joint = torch.cat([layer.weight.detach() for layer in layers])
    # The plain weights become views of it: beside it and its packed form there would else be a third copy.
    for layer, rows in zip(layers, joint.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = rows
    return joint
