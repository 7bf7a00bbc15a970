"""Low bits: sublayers, and the output head, whose weights q' runs in 8 or 4 bits (:mod:`viasd_calib.slim.low_bit`).

They are a copy of what the other parts of the route run, made when the spec is loaded; the copy takes memory, which
skipped sublayers and narrow MLPs do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field
from torch import nn

from viasd_calib.errors import SpecError
from viasd_calib.slim.linears import LinearPlace, plain_linears
from viasd_calib.slim.lora_linear import LoRALinear
from viasd_calib.slim.low_bit import InputBits, LowBitLinear, round_linears
from viasd_calib.slim.onednn_linear import refuse_packed
from viasd_calib.slim.parts.adapter import of_adapter
from viasd_calib.slim.parts.base import FitInputs, Mark, PartOptions, RoutePart, Sizes, register
from viasd_calib.slim.parts.head_vocab import SlimHead
from viasd_calib.slim.plan import MODULES, SlimPlan, share_parameters
from viasd_calib.spec import LowBits, LowBitWeights, Route

Bits = Literal[16, 8, 4]
KINDS: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")


class LowBitOptions(PartOptions):
    """How many bits weights have.

    Attributes:
        bits: of all sublayers that the route keeps, and of the output head.
        attention: layers whose attention has others, by bits: ``{"16": [0], "4": [7, 8]}``.
        mlp: layers whose MLP has others.
        head: of the output head, where it has others.
        input_bits: of what enters a layer.
    """

    bits: Bits = 8
    attention: dict[Literal["16", "8", "4"], list[int]] = Field(default_factory=dict)
    mlp: dict[Literal["16", "8", "4"], list[int]] = Field(default_factory=dict)
    head: Bits | None = None
    input_bits: InputBits = 16

    def by_bits(self, kind: Literal["attention", "mlp"], kept: set[int], layers: int) -> dict[str, list[int]]:
        """The layers of a kind that a route keeps in 8 and 4 bits.

        Raises:
            SpecError: a layer is named that the verifier does not have.
        """
        found = dict.fromkeys(range(layers), str(self.bits))
        for bits, named in getattr(self, kind).items():
            beyond = [layer for layer in named if layer not in found]
            if beyond:
                raise SpecError(
                    f"options of the part low_bit: {kind} names layer {beyond[0]}, the verifier has layers 0 to "
                    f"{layers - 1}"
                )
            found.update(dict.fromkeys(named, bits))
        low = {str(bits): [layer for layer in sorted(kept) if found[layer] == str(bits)] for bits in get_args(LowBits)}
        return {bits: named for bits, named in low.items() if named}


@register
class LowBit(RoutePart[LowBitWeights]):
    """Sublayers and a head in low bits; it holds its entry, for weights are made of q's own."""

    name = "low_bit"
    title = "weights of low bits"
    contents = "which"
    options = LowBitOptions
    last = True

    def fit(self, inputs: FitInputs, options: PartOptions) -> LowBitWeights:
        """What the options say, of the sublayers that the route keeps."""
        assert isinstance(options, LowBitOptions)
        route, layers = inputs.route, inputs.full.config.num_hidden_layers
        skipped = {"attention": route.attention_skip, "mlp": route.mlp_skip}
        kept = {kind: {*range(layers)}.difference(skipped[kind]) for kind in KINDS}
        head = options.bits if options.head is None else options.head
        return LowBitWeights.model_validate(
            {
                **{kind: options.by_bits(kind, kept[kind], layers) for kind in KINDS},
                "head": None if head == 16 else head,
                "input_bits": options.input_bits,
            }
        )

    def save(self, held: LowBitWeights, route: Route, folder: Path, options: PartOptions) -> LowBitWeights:
        """Nothing is written but the entry."""
        return held

    def load(self, route: Route, folder: Path, sizes: Sizes) -> LowBitWeights:
        assert route.low_bit is not None, "asked of a route with low bits"
        return route.low_bit

    def install(self, plan: SlimPlan, held: LowBitWeights) -> None:
        """Round what other parts left of the named sublayers, in copies; q's own modules stay as they are."""
        refuse_packed(plan.full.model)
        layers = nn.ModuleList(share_parameters(layer) for layer in plan.layers)
        for kind in KINDS:
            for index, bits in held.bits(kind).items():
                for place in verifier_linears(layers[index].get_submodule(MODULES[kind])):
                    place.put(LowBitLinear(place.linear, bits, held.input_bits))
        plan.layers = layers
        if held.head is not None:
            plan.head = plan.head or SlimHead(plan.full.head_rows())
            round_linears([plan.head], held.head, held.input_bits)

    def line(self, route: Route, layers: int) -> str:
        assert route.low_bit is not None, "asked of a route with low bits"
        entry = route.low_bit
        kept = 2 * layers - len(route.attention_skip) - len(route.mlp_skip)
        words = [
            f"{'all' if count == kept else count} sublayer{'s' if count != 1 else ''} in {bits} bits"
            for bits, count in _counts(entry).items()
        ]
        if entry.head is not None:
            words.append(f"head in {entry.head} bits")
        if entry.input_bits != 16:
            words.append(f"their inputs in {entry.input_bits} bits")
        return ", ".join(words)

    def drawing(self, route: Route, layers: int) -> list[Mark]:
        assert route.low_bit is not None, "asked of a route with low bits"
        return [
            Mark(kind, layer, layer, f"in {bits} bits", bits / 16)
            for kind in KINDS
            for layer, bits in route.low_bit.bits(kind).items()
        ]


def _counts(entry: LowBitWeights) -> Mapping[int, int]:
    """How many sublayers have so many bits."""
    every = [bits for kind in KINDS for bits in entry.bits(kind).values()]
    return {bits: every.count(bits) for bits in get_args(LowBits) if bits in every}


def verifier_linears(module: nn.Module) -> Iterator[LinearPlace]:
    """Where a module's linear layers are, but for those of an adapter beside them.

    Example:
        >>> adapted = LoRALinear(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 4))
        >>> [place.path for place in verifier_linears(nn.ModuleDict({"q_proj": adapted, "k_proj": nn.Linear(4, 2)}))]
        ['k_proj', 'q_proj.base']
    """
    for place in plain_linears([module]):
        beside: Any = isinstance(place.holder, LoRALinear) and place.name != "base"
        if not beside and not of_adapter(place.path):
            yield place
