"""The route of a spec: which sublayers the slim verifier runs, and an entry for each other part of the route."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, create_model, field_validator, model_validator

from viasd_calib.errors import SpecError
from viasd_calib.schema.base import DType, SpecModel, TensorFile

PARTS_PACKAGE = "viasd_calib.slim.parts"
"""Package whose module X is the route part X."""
PARTS_GROUP = "viasd_calib.route_parts"
"""Entry points of other packages, each the module of the route part that it is named after."""


class PartEntry(SpecModel):
    """Base of a route part's entry in a spec: settings, and tensor files beside the spec."""

    @property
    def files(self) -> dict[str, TensorFile]:
        """Its tensor files, by the name of the field."""
        return {name: value for name, value in self if isinstance(value, TensorFile)}

    def misfits(self, num_layers: int, vocab_size: int) -> Iterator[str]:
        """What such a verifier cannot run, a line each: nothing, unless an entry says otherwise."""
        yield from ()


_OTHER_ENTRIES: dict[str, type[PartEntry]] = {}


def register_entry(name: str, kind: type[PartEntry]) -> None:
    """Let routes have an entry of this name; a part whose entry is a field of :class:`Route` needs none."""
    if name not in Route.model_fields:
        _OTHER_ENTRIES[name] = kind


def import_part(name: str) -> None:
    """Import the module of a route part, which registers it; nothing where there is none of this name.

    Raises:
        SpecError: the module that another package names for it cannot be imported, or registers no such part.
    """
    for point in entry_points(group=PARTS_GROUP, name=name):
        try:
            point.load()
        except Exception as error:  # whatever the module of another package raises
            raise SpecError(f"the part {name!r} cannot be imported from {point.value}: {error!r}; mend it") from error
        if name not in _OTHER_ENTRIES:
            raise SpecError(f"{point.value} registers no part {name!r} with an entry; mend its entry point or its name")
    module = f"{PARTS_PACKAGE}.{name}"
    if name.isidentifier() and find_spec(module) is not None:
        importlib.import_module(module)


def _entry_kind(name: str) -> type[PartEntry] | None:
    if name not in _OTHER_ENTRIES:
        import_part(name)
    return _OTHER_ENTRIES.get(name)


class RelativeCost(SpecModel):
    """Measured time of a slim pass over that of a full pass of the same width (tokens)."""

    measured: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="time of a slim pass over that of a full pass, by width (new tokens of a pass)"
    )
    device: str = Field(description="that it was measured on")
    dtype: DType = Field(description="number format that it was measured in")


AdapterKind = Literal["lora", "dora", "norms"]
"""``lora`` (Hu et al. 2021, arXiv 2106.09685) and ``dora`` (Liu et al. 2024, arXiv 2402.09353) add products of low rank
to linear layers; ``norms`` are other weights of norms (Zhao et al. 2023, arXiv 2312.11420) and cost a pass nothing."""


class AdapterRef(PartEntry):
    """An adapter in peft's format, active on the slim path alone.

    A ``folded`` one is added, when it is loaded, into copies of the weights that it sits on: a pass then has no
    products of its own for it, and the copies take memory. ``dora`` is always folded; ``norms`` have neither rank nor
    alpha, and nothing to fold.
    """

    kind: AdapterKind = Field("lora", description="lora or dora: products of low rank; norms: other weights of norms")
    rank: int | None = Field(None, ge=1, description="of the products; null for norms")
    alpha: int | None = Field(None, gt=0, description="the products are scaled by alpha / rank; null for norms")
    targets: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="names of the modules that it changes"
    )
    folded: bool = Field(False, description="whether it is added into copies of the weights when it is loaded")
    tensors: TensorFile = Field(description="weights of the adapter, in peft's format")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> AdapterRef:
        ranked = self.rank is not None and self.alpha is not None
        if self.kind == "norms" and (self.rank is not None or self.alpha is not None or self.folded):
            raise ValueError("an adapter of kind norms has no rank and no alpha, and is not folded; leave them out")
        if self.kind != "norms" and not ranked:
            raise ValueError(f"an adapter of kind {self.kind} needs rank and alpha")
        if self.kind == "dora" and not self.folded:
            raise ValueError("an adapter of kind dora is folded when it is loaded; set folded to true")
        return self


class BridgesRef(PartEntry):
    """Linear maps of the residual stream, one in place of each run of skipped sublayers.

    ``rank`` is that of the maps; null for full ones. With ``carry`` each has a second map, of the stream after its run
    at the place before (:mod:`viasd_calib.slim.token_shift`).
    """

    rank: int | None = Field(None, ge=1, description="of the maps; null for full ones")
    carry: bool = Field(
        False,
        description="whether each bridge has a second map, of the residual stream after its run at the place before",
    )
    tensors: TensorFile = Field(description="the maps")


class HeadVocab(PartEntry):
    """The output tokens of the slim verifier: their number, and a file with their ids.

    Tokens that are not among them it leaves to the full verifier.
    """

    size: int = Field(ge=2, description="output tokens of the slim verifier")
    tensors: TensorFile = Field(description="their ids")

    def misfits(self, num_layers: int, vocab_size: int) -> Iterator[str]:
        """More tokens than the verifier has."""
        if self.size > vocab_size:
            yield (
                f"route.head_vocab has {self.size} output tokens, the verifier has {vocab_size}; export the spec again"
            )


class MlpWidths(PartEntry):
    """MLP sublayers that the slim verifier runs with some of their neurons alone.

    ``keep`` says how many, by layer. The file holds each of these layers' order of neurons, kept ones first, as the
    verifier's own file counts them (:mod:`viasd_calib.slim.parts.mlp_keep`).
    """

    keep: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="neurons that run, by layer"
    )
    tensors: TensorFile = Field(description="each layer's order of neurons, kept ones first")


Rounding = Literal["nearest", "gptq"]
"""How weights in low bits are rounded; :mod:`viasd_calib.slim.low_bit` and :mod:`viasd_calib.slim.gptq`."""
LowBits = Literal[8, 4]
"""Bits of a weight that a slim verifier runs in integers; :mod:`viasd_calib.slim.low_bit`."""
LayersByBits = dict[Literal["8", "4"], Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]]


class LowBitWeights(PartEntry):
    """Sublayers whose linear layers the slim verifier runs with weights in 8 or 4 bits; those not named have 16.

    By the rule ``nearest`` nothing is stored: the weights are rounded when the spec is loaded, from those that the
    other parts of the route run (:func:`viasd_calib.slim.low_bit.round_weight`). By ``gptq`` (Frantar et al. 2022,
    arXiv 2210.17323) they were rounded when it was fitted, and the file holds the integers of the verifier's own
    weights. They are a copy, which takes memory of its own.

    Example:
        >>> LowBitWeights(attention={"8": [0, 2]}, mlp={"8": [0], "4": [2]}, head=8).bits("mlp")
        {0: 8, 2: 4}
    """

    attention: LayersByBits = Field(
        default_factory=dict, description="layers whose attention has so many bits, by bits"
    )
    mlp: LayersByBits = Field(default_factory=dict, description="layers whose MLP has so many bits, by bits")
    head: LowBits | None = Field(None, description="bits of the output head's weights; null for 16")
    input_bits: Literal[16, 8] = Field(16, description="bits of what enters such a layer, with one scale a token")
    group: Literal[64] = Field(64, description="neighbouring weights of a row that share a scale in 4 bits")
    rule: Rounding = Field(
        "nearest", description="how weights are rounded: nearest, when the spec is loaded; gptq, when it was fitted"
    )
    tensors: TensorFile | None = Field(
        None, description="the integers, with steps and lowest values, of weights rounded by gptq; null for nearest"
    )

    @model_validator(mode="after")
    def _has_what_its_rule_needs(self) -> LowBitWeights:
        if self.rule == "gptq" and self.tensors is None:
            raise ValueError("low_bit of rule gptq has no tensors, which hold its integers; export the spec again")
        if self.rule == "nearest" and self.tensors is not None:
            raise ValueError("low_bit of rule nearest has tensors, and rounds when it is loaded; leave them out")
        return self

    @model_validator(mode="after")
    def _each_once(self) -> LowBitWeights:
        for name in ("attention", "mlp"):
            by_bits: LayersByBits = getattr(self, name)
            for layers in by_bits.values():
                if layers != sorted(set(layers)):
                    raise ValueError(f"layers of low_bit.{name} must be given once each, in rising order")
            both = sorted(set(by_bits.get("8", ())).intersection(by_bits.get("4", ())))
            if both:
                raise ValueError(f"low_bit.{name} names layer {both[0]} twice, in 8 and in 4 bits; take it out of one")
        if not (self.attention or self.mlp or self.head):
            raise ValueError("low_bit names neither a sublayer nor the head; name some, or leave low_bit out")
        return self

    def bits(self, kind: Literal["attention", "mlp"]) -> dict[int, LowBits]:
        """Bits of the sublayers of a kind, by layer, rising."""
        by_bits: LayersByBits = self.attention if kind == "attention" else self.mlp
        widths: tuple[LowBits, ...] = get_args(LowBits)
        found = {layer: width for width in widths for layer in by_bits.get(str(width), ())}  # type: ignore[call-overload]
        return dict(sorted(found.items()))


class AddedMemory(SpecModel):
    """Weights that the slim verifier has beside the full one's; each counts 16 bits, or 8 or 4 where it has these."""

    bytes: int = Field(ge=0, description="of these weights")
    share: float = Field(ge=0, description="of them over the full verifier's own")


class Route(SpecModel):
    """Which sublayers the slim verifier leaves out; decoder layers are counted from 0.

    Without ``mlp_keep`` its MLP sublayers are whole, without ``head_vocab`` it has the whole output vocabulary.
    """

    # Further entries are those of registered parts, and checked as such.
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    attention_skip: list[int] = Field(
        default_factory=list, description="layers whose attention the slim verifier leaves out; rising, from 0"
    )
    mlp_skip: list[int] = Field(default_factory=list, description="layers whose MLP it leaves out; rising, from 0")
    mlp_keep: MlpWidths | None = Field(None, description="MLPs that run with some of their neurons; null for none")
    bridges: BridgesRef | None = Field(None, description="linear maps in place of skipped runs; null for none")
    head_vocab: HeadVocab | None = Field(None, description="reduced output vocabulary; null for the verifier's own")
    adapter: AdapterRef | None = Field(None, description="weights of the slim path alone; null for none")
    low_bit: LowBitWeights | None = Field(None, description="sublayers in 8 or 4 bits; null for none")
    relative_cost: RelativeCost | None = Field(
        None, description="of a slim pass, measured at export; null where not measured"
    )

    memory: AddedMemory | None = Field(
        None, description="that the slim verifier takes beside the full one; null where not counted"
    )

    @field_validator("attention_skip", "mlp_skip")
    @classmethod
    def _sorted_and_unique(cls, layers: list[int]) -> list[int]:
        if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
            raise ValueError("layers must be given once each, in rising order, counted from 0")
        return layers

    @model_validator(mode="after")
    def _other_parts_are_known(self) -> Route:
        given = self.__pydantic_extra__ or {}
        if given:
            unknown = [name for name, value in given.items() if isinstance(value, dict) and _entry_kind(name) is None]
            if unknown:
                raise ValueError(f"{unknown[0]} is a part of a package that is not installed; install that package")
            known = {name: (kind | None, None) for name in given if (kind := _entry_kind(name)) is not None}
            others: type[SpecModel] = create_model("Route", __base__=SpecModel, **known)  # type: ignore[call-overload]
            given.update(others.model_validate_json(_as_json(given), strict=True))
        return self

    @model_validator(mode="after")
    def _changes_what_runs(self) -> Route:
        both = sorted(self.narrowed.intersection(self.mlp_skip))
        if both:
            raise ValueError(
                f"mlp_keep and mlp_skip both name layer {both[0]}; an MLP is narrowed or skipped, take it out of one"
            )
        skipped = {"attention": self.attention_skip, "mlp": self.mlp_skip}
        for kind, layers in self.low_bit_layers.items():
            both = sorted(layers.intersection(skipped[kind]))
            if both:
                raise ValueError(
                    f"low_bit.{kind} and {kind}_skip both name layer {both[0]}; a sublayer is skipped or has low "
                    "bits, take it out of one"
                )
        return self

    @model_validator(mode="after")
    def _rounds_what_is_there(self) -> Route:
        if (
            self.low_bit is not None
            and self.low_bit.rule == "gptq"
            and self.adapter is not None
            and self.adapter.folded
        ):
            raise ValueError(
                "low_bit of rule gptq has the integers of the verifier's own weights, and the adapter is folded into "
                "others; fit again with an adapter that is not, or with rounding nearest"
            )
        return self

    def entries(self) -> dict[str, PartEntry]:
        """The entries of its parts, by name, in the order in which parts are installed.

        Example:
            >>> file = TensorFile(path="head_vocab/head_vocab.safetensors", sha256="0" * 64)
            >>> [*Route(mlp_skip=[2], head_vocab=HeadVocab(size=9, tensors=file)).entries()]
            ['head_vocab']
        """
        return {name: entry for name, entry in self if isinstance(entry, PartEntry)}

    @property
    def files(self) -> list[TensorFile]:
        """Every tensor file that its parts refer to."""
        return [file for entry in self.entries().values() for file in entry.files.values()]

    @property
    def narrowed(self) -> frozenset[int]:
        """Layers whose MLP sublayer runs with some of its neurons."""
        return frozenset() if self.mlp_keep is None else frozenset(self.mlp_keep.keep)

    @property
    def low_bit_layers(self) -> dict[str, frozenset[int]]:
        """Layers whose attention or MLP has weights of low bits, by kind."""
        if self.low_bit is None:
            return {}
        return {kind: frozenset(self.low_bit.bits(kind)) for kind in ("attention", "mlp")}

    def unmeasured(self) -> Route:
        """The route without what was measured and counted when it was exported."""
        return self.model_copy(update={"relative_cost": None, "memory": None})

    def misfits(self, num_layers: int, vocab_size: int) -> Iterator[str]:
        """What a verifier with so many layers and tokens cannot run, a line each."""
        for entry in self.entries().values():
            yield from entry.misfits(num_layers, vocab_size)
        named = {"attention_skip": self.attention_skip, "mlp_skip": self.mlp_skip, "mlp_keep": sorted(self.narrowed)}
        named |= {f"low_bit.{kind}": sorted(layers) for kind, layers in self.low_bit_layers.items()}
        for name, layers in named.items():
            beyond = [layer for layer in layers if layer >= num_layers]
            if beyond:
                yield f"route.{name} names layer {beyond[0]}, the verifier has layers 0 to {num_layers - 1}"
        if len(self.attention_skip) == len(self.mlp_skip) == num_layers:
            yield "the route skips every sublayer of the verifier, so that there is no slim verifier; keep some"


def _as_json(entries: Mapping[str, Any]) -> str:
    return json.dumps(
        {name: entry.model_dump() if isinstance(entry, PartEntry) else entry for name, entry in entries.items()}
    )
