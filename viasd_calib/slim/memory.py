"""The memory that a slim verifier takes beside the full one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from viasd_calib.slim.linears import IntegerLinear
from viasd_calib.spec import AddedMemory

BYTES = 2
"""Of a weight that is not in low bits: weights are counted in 16 bits, whatever format they are loaded in."""


def added_memory(full: nn.Module, slim: Iterable[nn.Module], folded: bool = False) -> AddedMemory:
    """Weights of q' that are not q's own, in bytes and over q's own weights.

    A view of q's weights, as of the first neurons of an MLP, takes none. Asked before a backend packs weights.

    Args:
        full: q.
        slim: what q' runs.
        folded: whether an adapter that is being trained will be added into copies of the weights it sits on.

    Example:
        >>> from viasd_calib.slim.low_bit import LowBitLinear
        >>> full = nn.Linear(64, 64, bias=False)
        >>> added_memory(full, [full, LowBitLinear(full, 8)]).share
        0.5312
    """
    own = [*full.parameters()]
    places = {weight.untyped_storage().data_ptr() for weight in own}
    modules = nn.ModuleList(slim)
    new: dict[int, Tensor] = {
        id(one): one for one in modules.parameters() if one.untyped_storage().data_ptr() not in places
    }
    for adapted in modules.modules() if folded else ():
        base = getattr(adapted, "base_layer", None)  # of peft's layers
        if base is None:
            continue
        for weight in adapted.parameters():
            new.pop(id(weight), None)
        if isinstance(base, nn.Linear):
            new[id(base.weight)] = base.weight
    rounded = sum(module.memory() for module in modules.modules() if isinstance(module, IntegerLinear))
    added = BYTES * sum(weight.numel() for weight in new.values()) + rounded
    return AddedMemory(bytes=added, share=round(added / (BYTES * sum(weight.numel() for weight in own)), 4))
