"""How many bits a slim verifier of all layers may have where memory is little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from viasd_calib.choices import Backend
from viasd_calib.errors import ModelError
from viasd_calib.models.offloaded import layer_weights
from viasd_calib.slim.low_bit import Bits
from viasd_calib.slim.offload.residency import Residency, choose_residency
from viasd_calib.slim.plan import KINDS, MODULES
from viasd_calib.slim.resident import Holder, holder_of, low_bit_bytes, other_bytes
from viasd_calib.spec import LowBitWeights, Route


class LowBitChoice(NamedTuple):
    """Bits of the weights of a slim verifier.

    Attributes:
        options: of the part ``low_bit`` that give them.
    """

    attention: Bits
    mlp: Bits
    head: Bits
    options: dict[str, Any]


CHOICES = (
    LowBitChoice(8, 8, 8, {"bits": 8}),
    LowBitChoice(8, 4, 8, {"bits": 8, "mlp": 4}),
    LowBitChoice(4, 4, 4, {"bits": 4}),
)
"""From the one that agrees most to the one that takes least."""


def bits_for_memory(model: PreTrainedModel, memory: int, backend: Backend) -> tuple[LowBitChoice, Residency]:
    """The most bits with which what has to stay in memory fits, and what is then resident and cold.

    Args:
        model: the verifier, loaded without its layers, in the number format that it decodes in.
        memory: bytes that weights may take.
        backend: what will run it, in whose order weights are counted.

    Raises:
        ModelError: not even the fewest bits fit.
    """
    weights = layer_weights(model)
    if weights is None:
        raise ModelError("the verifier was loaded with its layers; load it with layers=False")
    layers = [*model.get_decoder().layers]
    others = other_bytes(model, weights)
    holder = holder_of(backend, model.device, model.dtype)
    refusals = []
    for choice in CHOICES:
        every = [*range(len(layers))]
        bits = LowBitWeights.model_validate(
            {kind: {str(getattr(choice, kind)): every} for kind in KINDS} | {"head": choice.head}
        )
        taken = others + _copy_bytes(model, layers, choice, holder)
        try:
            return choice, choose_residency(weights, layers, Route(low_bit=bits), taken, memory)
        except ModelError as error:
            refusals.append(error)
    raise refusals[-1]


def _copy_bytes(model: PreTrainedModel, layers: Sequence[nn.Module], choice: LowBitChoice, holder: Holder) -> int:
    """Bytes of a low-bit copy of all layers and the output head."""
    head: Any = model.get_output_embeddings()
    out, inputs = head.weight.shape
    found = low_bit_bytes(out, inputs, choice.head, holder)
    for layer in layers:
        for kind in KINDS:
            inside = layer.get_submodule(MODULES[kind]).modules()
            bits: Bits = getattr(choice, kind)
            found += sum(
                low_bit_bytes(one.out_features, one.in_features, bits, holder)
                for one in inside
                if isinstance(one, nn.Linear)
            )
    return found
