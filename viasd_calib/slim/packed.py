"""Linear layers whose weights lie in the order that oneDNN's kernels read on a CPU.

PyTorch keeps a linear layer's weight row by row, and in bfloat16 puts it into the order of its kernel anew in
each call, which takes longer than the product itself where a pass has few tokens. Here that is done once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from viasd_calib.slim.linears import LinearPlace, plain_linears

TYPICAL_WIDTH = 8
"""Rows of a product that the order is chosen for: the tokens of a verifying pass."""


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own order; gives what the layer it was made from gives, up to rounding.

    Args:
        weight: in oneDNN's order, as :func:`pack_weight` gives it.
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight = weight
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The weight in oneDNN's order: its type, shape and device can be asked, its values cannot (:meth:`plain`)."""
        return self._weight

    def plain(self) -> Tensor:
        """The weight in plain order, [out, in], put together anew."""
        return self._weight.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self.bias, "none", [], "")
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights can be packed: on a CPU that calculates in ``dtype``, by a PyTorch that was built with oneDNN."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack_weight(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's order: an opaque tensor that its linear kernels take."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_WIDTH)  # type: ignore[no-any-return]


def pack_linears(modules: Iterable[nn.Module]) -> None:
    """Exchange, in place, every linear layer inside ``modules`` for a packed one.

    Layers that share a weight share its packed form, so that q and q' still hold one copy between them, and a
    plain weight is freed once nobody else holds it. The modules can no longer be trained or saved.

    Example:
        >>> layer = nn.Sequential(nn.Linear(3, 2))
        >>> inputs = torch.ones(1, 3)
        >>> before = layer(inputs)
        >>> pack_linears([layer])
        >>> type(layer[0]).__name__, torch.allclose(layer(inputs), before)
        ('PackedLinear', True)
    """
    places: dict[int, list[LinearPlace]] = {}
    for place in plain_linears(modules):
        places.setdefault(id(place.linear.weight), []).append(place)
    while places:
        _, sharing = places.popitem()
        packed = pack_weight(sharing[0].linear.weight)
        for place in sharing:
            place.put(PackedLinear(packed, place.linear.bias))
