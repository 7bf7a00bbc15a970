"""Weights in low bits whose integers a spec brings along: their names in its file, what is refused, where they go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from viasd_calib.errors import SpecError
from viasd_calib.files import write_bytes
from viasd_calib.slim.linears import LinearPlace
from viasd_calib.slim.low_bit import Bits, InputBits, LowBitLinear, RoundedWeight
from viasd_calib.slim.offload.layer_files import Shape
from viasd_calib.slim.offload.rounded_files import of_stored, stored_shapes
from viasd_calib.slim.parts.adapter import without_adapter
from viasd_calib.slim.plan import KINDS
from viasd_calib.slim.tensors import read_tensors
from viasd_calib.spec import LowBitWeights, Route, tensor_file

HEAD = "head"
"""Name of the output head's weight in a file."""
AGAIN = "export the spec again"


class LearnedBits(NamedTuple):
    """Bits, and the integers that weights were rounded to.

    Attributes:
        entry: which sublayers have how many bits.
        tensors: codes, two of 4 bits to a byte, steps, and lowest values of 4 bits, as
            :func:`~viasd_calib.slim.offload.rounded_files.stored_parts` names them after their layer's name
            (:func:`sublayer_name`): ``layers.3.mlp.up_proj.codes``.
        path: of their file, for messages.
    """

    entry: LowBitWeights
    tensors: Mapping[str, Tensor]
    path: Path = Path("low_bit.safetensors")

    def weight(self, name: str, linear: nn.Linear, bits: Bits) -> RoundedWeight:
        """The weight of a layer, on its device.

        Args:
            name: of the layer in the file.
            linear: that it takes the place of.

        Raises:
            SpecError: a tensor is missing, or of another shape.
        """
        shapes = stored_shapes(linear.out_features, linear.in_features, bits)
        parts: dict[str, Tensor] = {}
        for part, wanted in shapes.items():
            found = self.tensors.get(f"{name}.{part}")
            if found is None or not _fits(found, wanted):
                wrong = "is missing" if found is None else f"is {_form(found)}, the verifier's is {_words(wanted)}"
                raise SpecError(f"{self.path}: {name}.{part} {wrong}; {AGAIN}")
            parts[part] = found.to(linear.weight.device)
        return of_stored(bits, linear.in_features, parts)

    def with_outputs(self, ids: Tensor) -> LearnedBits:
        """The same with some outputs of the head alone ([head vocabulary], long); as it is where it has no others."""
        tensors = {
            name: tensor[ids.to(tensor.device)] if name.startswith(f"{HEAD}.") and len(tensor) > len(ids) else tensor
            for name, tensor in self.tensors.items()
        }
        return self._replace(tensors=tensors)

    def put(self, sublayer: str, places: Sequence[LinearPlace[nn.Linear]], bits: Bits, input_bits: InputBits) -> None:
        """Put low-bit layers of these integers into the places of a sublayer's linear ones.

        Raises:
            SpecError: a tensor is missing, of another shape, or of no layer that the sublayer has.
        """
        names = {f"{sublayer}.{without_adapter(place.path)}": place for place in places}
        for name in self.tensors:
            if name.startswith(f"{sublayer}.") and name.rpartition(".")[0] not in names:
                raise SpecError(f"{self.path}: {name} is of no linear layer of the verifier; {AGAIN}")
        for name, place in names.items():
            weight = self.weight(name, place.linear, bits)
            place.put(LowBitLinear(place.linear, bits, input_bits, weight))


def sublayer_name(kind: str, layer: int) -> str:
    """What names of a sublayer's tensors begin with, before the name of their linear layer.

    Example:
        >>> sublayer_name("mlp", 3)
        'layers.3.mlp'
    """
    return f"layers.{layer}.{kind}"


def save_learned(held: LearnedBits, path: Path, folder: Path) -> LowBitWeights:
    """Write integers to ``path``, atomically.

    Args:
        folder: of the spec that will name the file.

    Returns:
        The entry that names the file.
    """
    write_bytes(path, save({name: tensor.contiguous().cpu() for name, tensor in held.tensors.items()}))
    return held.entry.model_copy(update={"rule": "gptq", "tensors": tensor_file(path, folder)})


def read_learned(route: Route, path: Path, vocab: int, hidden: int) -> LearnedBits:
    """Read the integers of a route, and check them as far as that can be without the verifier.

    Args:
        vocab: tokens of the verifier.
        hidden: its width.

    Raises:
        SpecError: the file is missing or damaged, or a tensor of it is missing, misshapen or of no sublayer.
    """
    entry = route.low_bit
    assert entry is not None, "asked of a route with low bits"
    tensors = read_tensors(path, "weights in low bits")
    rows = vocab if route.head_vocab is None else route.head_vocab.size
    for wrong in _misfits(entry, tensors, (rows, hidden)):
        raise SpecError(f"{path}: {wrong}; {AGAIN}")
    return LearnedBits(entry, tensors, path)


def _misfits(entry: LowBitWeights, tensors: Mapping[str, Tensor], head: tuple[int, int]) -> Iterator[str]:
    """What is wrong with the tensors of an entry.

    Args:
        head: sizes of the output head, [outputs, inputs].
    """
    places: dict[str, Bits] = {
        sublayer_name(kind, layer): bits for kind in KINDS for layer, bits in entry.bits(kind).items()
    }
    weights: dict[str, dict[str, Tensor]] = defaultdict(dict)
    linears: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, tensor in tensors.items():
        weight, _, part = name.rpartition(".")
        place, linear = _divided(weight)
        if linear and place in places:
            linears[place.rpartition(".")[2]].append(linear)
        elif weight != HEAD or entry.head is None:
            yield f"{name} is of no sublayer that low_bit names"
        weights[weight][part] = tensor
    for place, bits in places.items():
        # Layers of a verifier are alike, so that what one has in low bits all have.
        named = sorted({*linears[place.rpartition(".")[2]]})
        if not named:
            yield f"the tensors of {place} are missing"
        for linear in named:
            yield from _wrong_parts(f"{place}.{linear}", bits, weights[f"{place}.{linear}"])
    if entry.head is not None:
        yield from _wrong_parts(HEAD, entry.head, weights[HEAD], head)


def _divided(weight: str) -> tuple[str, str]:
    """The sublayer that a weight's name begins with, and the name of its linear layer there."""
    words = weight.split(".")
    return ".".join(words[:3]), ".".join(words[3:])


def _fits(tensor: Tensor, wanted: Shape) -> bool:
    return (tuple(tensor.shape), tensor.dtype) == wanted


def _form(tensor: Tensor) -> str:
    return _words(Shape(tuple(tensor.shape), tensor.dtype))


def _words(shape: Shape) -> str:
    """A number format and sizes, for messages."""
    return f"{str(shape.dtype).removeprefix('torch.')} {[*shape.sizes]}"


def _wrong_parts(
    name: str, bits: Bits, parts: Mapping[str, Tensor], sizes: tuple[int, int] | None = None
) -> Iterator[str]:
    """What is wrong with the tensors of one weight.

    Args:
        sizes: outputs and inputs; None where the verifier alone knows them, and its tensors have to go together.
    """
    shapes = stored_shapes(1, 1, bits)
    for part in sorted(shapes.keys() - parts.keys()):
        yield f"{name}.{part} is missing"
    for part in sorted(parts.keys() - shapes.keys()):
        yield f"{name}.{part} is no tensor of a weight in {bits} bits"
    if parts.keys() != shapes.keys():
        return
    codes = parts["codes"]
    if codes.ndim == 2 and codes.numel():
        width = (
            codes.shape[1] if bits == 8 else 2 * codes.shape[1]
        )  # of an odd number of inputs one less: as many groups
        shapes = stored_shapes(*(sizes or (codes.shape[0], width)), bits)
    for part, wanted in shapes.items():
        found = parts[part]
        if not _fits(found, wanted):
            yield f"{name}.{part} is {_form(found)}, where {_words(wanted)} belongs"
        elif found.is_floating_point() and not bool(found.isfinite().all()):
            yield f"{name}.{part} has numbers that are not finite"
    if codes.dtype == torch.int8 and bool((codes == -128).any()):
        yield f"{name}.codes has codes below -127"
