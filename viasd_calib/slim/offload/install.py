"""Put q's cold sublayers behind a stream: their linear layers read buffers that a thread fills."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from viasd_calib.choices import Backend
from viasd_calib.errors import ModelError
from viasd_calib.files import remove_abandoned
from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.models.hashes import cache_folder
from viasd_calib.models.offloaded import LayerWeights, is_without_memory, layer_weights
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.fused_linear import joint_bias, put_product, siblings_in
from viasd_calib.slim.linears import StreamedLinear, plain_linears
from viasd_calib.slim.low_bit import GROUP
from viasd_calib.slim.native.linear import NativeLinear
from viasd_calib.slim.native.packing import TILE, PackedWeight, pack_bfloat16, whole
from viasd_calib.slim.offload.layer_files import (
    LAYERS,
    Shape,
    SublayerFile,
    check_room,
    files_folder,
    places_of,
    sublayer_file,
)
from viasd_calib.slim.offload.reading import DiskSource, HostSource, SublayerSource, Throttled
from viasd_calib.slim.offload.residency import Residency, choose_residency, cold_sublayers
from viasd_calib.slim.offload.rounded_files import LOW_BITS
from viasd_calib.slim.offload.settings import Offload, check_offload
from viasd_calib.slim.offload.stream import HostStream, SublayerStream, taken
from viasd_calib.slim.plan import MODULES, SublayerKind
from viasd_calib.slim.resident import holder_of, other_bytes, slim_bytes
from viasd_calib.spec import Route

Key = tuple[SublayerKind, int]
"""A sublayer: its kind, and the number of its decoder layer."""


@dataclass(frozen=True)
class ColdSublayers:
    """q's sublayers that are read for each of its passes.

    Attributes:
        positions: of each in the stream.
        residency: what is in memory, and what is not.
        slim_bytes: of what q' holds beside q.
    """

    offload: Offload
    stream: SublayerStream
    positions: Mapping[Key, int]
    residency: Residency
    slim_bytes: int

    def bytes_per_second(self) -> float:
        """How fast they are read in their order, nothing else being done; after a first reading that is not counted."""
        for _ in range(2):
            begin = time.perf_counter()
            for position in self.positions.values():
                with taken(self.stream, position):
                    pass
            seconds = time.perf_counter() - begin
        return self.residency.cold_bytes / seconds


class ColdProduct(NamedTuple):
    """One product of a cold sublayer.

    Attributes:
        holder: the module whose attributes ``names`` its layers are; more than one where they read the same input.
    """

    holder: nn.Module
    names: Sequence[str]
    linears: Sequence[nn.Linear]

    @property
    def name(self) -> str:
        """Of its weight in a file."""
        return "+".join(self.names)


class LeftOutLinear(nn.Module):
    """What holds the place of a cold layer in a copy of its decoder layer, whose sublayer q' skips."""

    def forward(self, _: Tensor) -> Tensor:
        """Refuse: nothing is to run it."""
        raise ModelError("a sublayer that the slim verifier skips has been run in it; load the engine anew")


def keep_resident(model: PreTrainedModel, route: Route) -> None:
    """Bring into memory what q' runs of q's own weights, where a model was loaded without its layers."""
    weights = layer_weights(model)
    if weights is None:
        return
    layers = model.get_decoder().layers
    cold = cold_sublayers(route, len(layers))
    inside = {id(one) for layer, kinds in cold.items() for one in linears_in(layers[layer], kinds)}
    weights.keep([one.weight for one in weights.linears if id(one) not in inside])


def stream_layers(routed: RoutedModel, route: Route | None, offload: Offload, backend: Backend) -> None:
    """Let q read its cold sublayers for each pass, in place; asked before a backend prepares the modules.

    Args:
        route: of q'; None where there is none, and all of q may be cold.

    Raises:
        ModelError: the backend or the device cannot do so, the memory is too little, or the model has its layers.
        StorageError: files cannot be written or read.
    """
    check_offload(offload, str(routed.model.device), backend)
    weights = layer_weights(routed.model)
    if weights is None:
        raise ModelError("the verifier was loaded with its layers; load it with layers=False, or leave out the Offload")
    if weights.sha256 is None:
        raise ModelError("the verifier's weights have no hash to keep them under; give a folder, a hub id or a .gguf")
    own = slim_bytes(
        routed.model, routed.slim_networks, backend, holder_of(backend, routed.model.device, routed.model.dtype)
    )
    others = other_bytes(routed.model, weights) + own
    residency = choose_residency(weights, [*routed.layers], route, others, offload.memory)
    for layer, kinds in cold_sublayers(route, len(routed.layers)).items():
        if layer not in residency.cold:
            weights.keep([one.weight for one in linears_in(routed.layers[layer], kinds)])
    native = backend == "native"
    if residency.cold:
        folder = files_folder(weights.sha256, "native" if native else str(routed.model.dtype).removeprefix("torch."))
        routed.cold = _cold_sublayers(routed, weights, residency, offload, native, folder, own)
    weights.release()
    for name in (LAYERS, LOW_BITS):
        remove_abandoned(cache_folder() / name / weights.sha256)


def _cold_sublayers(
    routed: RoutedModel,
    weights: LayerWeights,
    residency: Residency,
    offload: Offload,
    native: bool,
    folder: Path,
    slim: int,
) -> ColdSublayers:
    keys: list[Key] = [(kind, layer) for layer, kinds in residency.cold.items() for kind in kinds]
    products = [cold_products(routed.layers[layer].get_submodule(MODULES[kind]), native) for kind, layer in keys]
    paths = [folder / f"layer-{layer:03d}-{kind}.bin" for kind, layer in keys]
    shapes = [{one.name: _shape(one, native) for one in own} for own in products]
    check_room({path: places_of(own)[1] for path, own in zip(paths, shapes, strict=True)})
    files = [
        sublayer_file(path, shape, _maker(weights, own, native))
        for path, shape, own in zip(paths, shapes, products, strict=True)
    ]
    stream = _open_stream(files, offload, routed.model.device)
    for position, (file, own) in enumerate(zip(files, products, strict=True)):
        for product in own:
            _bind(product, file.places[product.name].view(stream.buffer(position)), native)
    for position, (kind, layer) in enumerate(keys):
        module = routed.layers[layer].get_submodule(MODULES[kind])
        _hook(module, stream, position)
        copied = routed.slim_layers[layer].get_submodule(MODULES[kind])
        for place in [] if copied is module else plain_linears([copied]):
            if is_without_memory(place.linear.weight):  # a backend would pack a copy of its own, of zeros
                place.put(LeftOutLinear())
    return ColdSublayers(offload, stream, {key: position for position, key in enumerate(keys)}, residency, slim)


def linears_in(layer: nn.Module, kinds: Sequence[SublayerKind]) -> list[nn.Linear]:
    """The linear layers of some sublayers of a decoder layer."""
    return [place.linear for place in plain_linears(layer.get_submodule(MODULES[kind]) for kind in kinds)]


def cold_products(holder: nn.Module, joint: bool) -> list[ColdProduct]:
    """The products of a sublayer, in order.

    Args:
        holder: its module.
        joint: whether layers that read the same input are one product.
    """
    places = plain_linears([holder])
    groups = siblings_in(holder) if joint else []
    of_a_group = {id(linear) for group in groups for linear in group}
    names = {id(place.linear): place for place in places}
    found = [ColdProduct(holder, [names[id(one)].name for one in group], group) for group in groups]
    alone = [place for place in places if id(place.linear) not in of_a_group]
    return [*found, *(ColdProduct(place.holder, [place.name], [place.linear]) for place in alone)]


def _shape(product: ColdProduct, native: bool) -> Shape:
    """Of a product's weight in a file."""
    out = sum(linear.out_features for linear in product.linears)
    inputs = product.linears[0].in_features
    if not native:
        return Shape((out, inputs), product.linears[0].weight.dtype)
    return Shape((whole(out, TILE) // TILE, whole(inputs, GROUP) // 2, TILE, 2), torch.bfloat16)


def _maker(weights: LayerWeights, products: Sequence[ColdProduct], native: bool) -> Callable[[], Mapping[str, Tensor]]:
    def make() -> Mapping[str, Tensor]:
        found = {}
        for product in products:
            weight = torch.cat(weights.read([linear.weight for linear in product.linears]))  # [out, in]
            found[product.name] = pack_bfloat16(weight).tiles if native else weight
        give_freed_memory_back()
        return found

    return make


def _open_stream(files: Sequence[SublayerFile], offload: Offload, device: torch.device) -> SublayerStream:
    sizes = [file.bytes for file in files]
    if device.type == "cuda":
        from viasd_calib.slim.offload.cuda_stream import CudaStream

        return CudaStream(HostSource(files, pinned=True).tensors, device)
    source: SublayerSource = DiskSource(files) if offload.kind == "disk" else HostSource(files)
    return HostStream(
        source if offload.bytes_per_second is None else Throttled(source, offload.bytes_per_second), sizes
    )


def _bind(product: ColdProduct, view: Tensor, native: bool) -> None:
    """Put layers that read a buffer into the places of a product's."""
    sizes = [linear.out_features for linear in product.linears]
    if not native:
        (linear,) = product.linears
        streamed = StreamedLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        streamed.weight = nn.Parameter(view, requires_grad=False)
        streamed.bias = linear.bias
        setattr(product.holder, product.names[0], streamed)
        return
    none = torch.empty(0)
    packed = PackedWeight(16, (sum(sizes), product.linears[0].in_features), view, none, none)
    layer = NativeLinear(packed, joint_bias([linear.bias for linear in product.linears], sizes))
    if len(sizes) == 1:
        setattr(product.holder, product.names[0], layer)
    else:
        put_product(product.holder, product.names, layer, sizes)


def _hook(holder: nn.Module, stream: SublayerStream, position: int) -> None:
    """Take a sublayer's weights for each forward of its module, and give them back, also where it fails."""

    def take(*_: Any) -> None:
        stream.take(position)

    def give_back(*_: Any) -> None:
        stream.give_back()

    holder.register_forward_pre_hook(take)
    holder.register_forward_hook(give_back, always_call=True)
