"""How many bits a slim verifier of all layers may have where memory is little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from viasd_calib.errors import ModelError
from viasd_calib.models.offloaded import is_without_memory, layer_weights
from viasd_calib.slim.low_bit import Bits, rounded_bytes
from viasd_calib.slim.offload.residency import Residency, choose_residency
from viasd_calib.slim.plan import KINDS, MODULES
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


def bits_for_memory(model: PreTrainedModel, memory: int) -> tuple[LowBitChoice, Residency]:
    """The most bits with which what has to stay in memory fits, and what is then resident and cold.

    Args:
        model: the verifier, loaded without its layers, in the number format that it decodes in.
        memory: bytes that weights may take.

    Raises:
        ModelError: not even the fewest bits fit.
    """
    weights = layer_weights(model)
    if weights is None:
        raise ModelError("the verifier was loaded with its layers; load it with layers=False")
    layers = [*model.get_decoder().layers]
    others = {one.data_ptr(): one.nbytes for one in model.parameters() if not is_without_memory(one)}
    refusals = []
    for choice in CHOICES:
        every = [*range(len(layers))]
        bits = LowBitWeights.model_validate(
            {kind: {str(getattr(choice, kind)): every} for kind in KINDS} | {"head": choice.head}
        )
        taken = sum(others.values()) + _copy_bytes(model, layers, choice)
        try:
            return choice, choose_residency(weights, layers, Route(low_bit=bits), taken, memory)
        except ModelError as error:
            refusals.append(error)
    raise refusals[-1]


def _copy_bytes(model: PreTrainedModel, layers: Sequence[nn.Module], choice: LowBitChoice) -> int:
    """Bytes of a low-bit copy of all layers and the output head."""
    head: Any = model.get_output_embeddings()
    out, inputs = head.weight.shape
    found = rounded_bytes(out, inputs, choice.head)
    for layer in layers:
        for kind in KINDS:
            inside = layer.get_submodule(MODULES[kind]).modules()
            bits: Bits = getattr(choice, kind)
            found += sum(
                rounded_bytes(one.out_features, one.in_features, bits) for one in inside if isinstance(one, nn.Linear)
            )
    return found
