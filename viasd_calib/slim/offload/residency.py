"""Which of q's layers are cold: read for each pass of q, while what q' runs is resident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from viasd_calib.errors import ModelError
from viasd_calib.models.offloaded import LayerWeights, layer_linears
from viasd_calib.slim.offload.layer_files import PAGE
from viasd_calib.slim.offload.stream import BUFFERS
from viasd_calib.slim.plan import KINDS, MODULES, SublayerKind
from viasd_calib.spec import Route


@dataclass(frozen=True)
class Residency:
    """What of q is cold.

    Attributes:
        cold: the cold sublayers of each layer that has some, by the layer's number.
        cold_bytes: of their weights.
        resident_bytes: of all other weights of q, of q' beside them, and of the buffers for cold layers.
    """

    cold: Mapping[int, Sequence[SublayerKind]]
    cold_bytes: int
    resident_bytes: int


def cold_sublayers(route: Route | None, layers: int) -> dict[int, list[SublayerKind]]:
    """Sublayers that q' does not run with q's own weights: those that it skips, and those it has a low-bit copy of.

    Nothing that products of an adapter or a narrow MLP of q' sit on is cold; norms of its own sit on no linear layer.
    Without a route all sublayers are.

    Example:
        >>> cold_sublayers(Route(attention_skip=[1], mlp_skip=[0, 1]), 3)
        {0: ['mlp'], 1: ['attention', 'mlp']}
    """
    if route is None:
        return {layer: [*KINDS] for layer in range(layers)}
    skipped: dict[SublayerKind, set[int]] = {"attention": set(route.attention_skip), "mlp": set(route.mlp_skip)}
    copied: dict[SublayerKind, set[int]] = {kind: set() for kind in KINDS}
    if route.low_bit is not None and not _adds_products(route):
        copied = {"attention": set(route.low_bit.bits("attention")), "mlp": set(route.low_bit.bits("mlp"))}
        copied["mlp"] -= route.narrowed
    found: dict[int, list[SublayerKind]] = {
        layer: [kind for kind in KINDS if layer in skipped[kind] | copied[kind]] for layer in range(layers)
    }
    return {layer: kinds for layer, kinds in found.items() if kinds}


def _adds_products(route: Route) -> bool:
    """Whether a route has an adapter that sits on linear layers."""
    return route.adapter is not None and route.adapter.kind != "norms"


def choose_residency(
    weights: LayerWeights, layers: Sequence[nn.Module], route: Route | None, others: int, memory: int | None
) -> Residency:
    """Which sublayers are cold: as few as the memory allows, spread over the model so that reading keeps up.

    None is where all of them fit without the buffers; else one layer's are at least.

    Args:
        layers: q's own.
        others: bytes of what is in memory besides: q's other weights, and what q' has of its own.
        memory: bytes that all of these may take; None for as little as can be.

    Raises:
        ModelError: the route runs all of q's own weights, or what has to be resident takes more.
    """
    cold = cold_sublayers(route, len(layers))
    if not cold:
        raise ModelError(_why_nothing_is_cold(route))
    every = others + sum(one.weight.nbytes for one in weights.linears)
    if memory is not None and every <= memory:
        return Residency({}, 0, every)
    size = {layer: sublayer_bytes(layers[layer], kinds) for layer, kinds in cold.items()}
    longest = [sublayer_bytes(layers[layer], [kind]) for layer, kinds in cold.items() for kind in kinds]
    needed = every - sum(size.values()) + min(BUFFERS, len(longest)) * (max(longest) + PAGE)
    if memory is not None and needed > memory:
        raise ModelError(
            f"what has to stay in memory takes {needed:,} bytes, and --memory allows {memory:,}; allow more, or fit a "
            "slim verifier of fewer bits or sublayers"
        )
    room = 0 if memory is None else memory - needed
    resident = set[int]()
    for layer in _spread(sorted(size)):
        if size[layer] <= room and len(resident) < len(size) - 1:
            room -= size[layer]
            resident.add(layer)
    left = {layer: kinds for layer, kinds in cold.items() if layer not in resident}
    more = sum(size[layer] for layer in resident)
    return Residency(left, sum(size[layer] for layer in left), needed + more)


def _why_nothing_is_cold(route: Route | None) -> str:
    """In words, with what mends it."""
    kept = {"an adapter": route is not None and _adds_products(route), "narrow MLPs": bool(route and route.narrowed)}
    there = [name for name, has in kept.items() if has]
    if there and route is not None and any(route.low_bit_layers.values()):
        return (
            f"the route has {' and '.join(there)} on all that it has in low bits, which keep the full verifier's own "
            "weights in memory; fit a slim verifier of low bits without, or leave out --offload"
        )
    return (
        "the slim verifier runs all of the full one's own sublayers, so that none can be left out of memory; give a "
        "spec whose route has sublayers in low bits or skips some, or leave out --offload"
    )


def sublayer_bytes(layer: nn.Module, kinds: Sequence[SublayerKind]) -> int:
    """Bytes of the linear layers of some sublayers of a decoder layer."""
    return sum(one.weight.nbytes for one in layer_linears(layer.get_submodule(MODULES[kind]) for kind in kinds))


def _spread(layers: Sequence[int]) -> list[int]:
    """Layers in such an order that the first few of them are far from each other.

    Example:
        >>> _spread([0, 1, 2, 3, 4, 5, 6, 7])
        [4, 2, 6, 1, 3, 5, 7, 0]
    """
    order: list[int] = []
    step = len(layers)
    while step > 1:
        step = -(-step // 2)
        order += [layers[n] for n in range(step, len(layers), step) if layers[n] not in order]
    return [*order, *(layer for layer in layers if layer not in order)]
