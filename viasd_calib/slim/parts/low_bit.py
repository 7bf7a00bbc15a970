"""Low bits: sublayers, and the output head, whose weights q' runs in 8 or 4 bits (:mod:`viasd_calib.slim.low_bit`).

They are a copy of what the other parts of the route run, made when the spec is loaded, or of integers that the spec
brings along (:mod:`viasd_calib.slim.learned_rounding`); the copy takes memory, which skipped sublayers and narrow MLPs
do not. A copy that is made, of a verifier whose layers are read for each pass, is made once, and kept
(:mod:`viasd_calib.slim.offload.rounded_files`).
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, PrivateAttr, model_validator
from torch import nn

from viasd_calib.errors import JobWarning, ModelError, SpecError
from viasd_calib.files import read_json, write_json
from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.models.offloaded import layer_weights
from viasd_calib.slim.bit_choice import MeasuredBits, choose_bits
from viasd_calib.slim.bit_costs import Shape, product_seconds
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.learned_bits import HEAD, LearnedBits, read_learned, save_learned, sublayer_name
from viasd_calib.slim.learned_rounding import learn_rounding, refuse_without_texts
from viasd_calib.slim.linears import LinearPlace, plain_linears
from viasd_calib.slim.lora_linear import LoRALinear
from viasd_calib.slim.low_bit import InputBits, LowBitLinear, widened_weights
from viasd_calib.slim.offload.rounded_files import rounded_weights
from viasd_calib.slim.onednn_linear import refuse_packed
from viasd_calib.slim.parts.adapter import verifier_linears
from viasd_calib.slim.parts.base import FitInputs, Mark, PartOptions, RoutePart, Sizes, register
from viasd_calib.slim.parts.head_vocab import SlimHead, read_head_ids
from viasd_calib.slim.plan import KINDS, MODULES, SlimPlan, share_parameters
from viasd_calib.spec import LowBits, LowBitWeights, Rounding, Route

Bits = Literal[16, 8, 4]
LayersByBits = dict[Literal["16", "8", "4"], list[int]]
MEASURED_FILE = "low_bit.json"
"""Where a fit leaves what bits were chosen by."""
TEXTS = 8
"""Texts that divergences are measured on, drawn from all."""
SEED = 0
"""Of that draw."""


class LowBitOptions(PartOptions):
    """How many bits weights have.

    Attributes:
        bits: of all sublayers that the route keeps, and of the output head; "auto" chooses for each.
        attention: of every attention; or the layers whose attention has others, by bits: ``{"16": [0], "4": [7, 8]}``.
        mlp: the same of MLPs.
        head: of the output head, where it has others.
        input_bits: of what enters a layer.
        options: the numbers of bits that ``bits: auto`` chooses among, by measured divergence and cost.
        rounding: ``nearest`` when a spec is loaded, or ``gptq`` on texts that q wrote: the spec then holds integers.
    """

    bits: Literal[16, 8, 4, "auto"] = 8
    attention: Bits | LayersByBits = Field(default_factory=dict)
    mlp: Bits | LayersByBits = Field(default_factory=dict)
    head: Bits | None = None
    input_bits: InputBits = 16
    options: tuple[Bits, ...] = Field((16, 8, 4), min_length=1)
    rounding: Rounding = "nearest"

    @model_validator(mode="after")
    def _chosen_or_named(self) -> LowBitOptions:
        if self.bits == "auto" and (self.attention or self.mlp or self.head is not None):
            raise ValueError("bits auto chooses for all; leave out attention, mlp and head, or give bits a number")
        if self.bits != "auto" and not self._names_low_bits():
            raise ValueError("everything has 16 bits, so that there are no low bits; name some, or leave low_bit out")
        return self

    @model_validator(mode="after")
    def _each_once(self) -> LowBitOptions:
        for kind in KINDS:
            asked: Bits | LayersByBits = getattr(self, kind)
            named = [layer for layers in asked.values() for layer in layers] if isinstance(asked, dict) else []
            twice = [layer for layer in named if named.count(layer) > 1]
            if twice:
                raise ValueError(f"{kind} names layer {twice[0]} twice; take it out of one of the lists")
        return self

    def _names_low_bits(self) -> bool:
        """Whether some of what may be named has 8 or 4 bits."""
        asked = [self.attention, self.mlp, self.bits if self.head is None else self.head]
        bits = [[self.bits, *map(int, one)] if isinstance(one, dict) else [one] for one in asked]
        return any(number != 16 for numbers in bits for number in numbers)

    def by_bits(self, kind: Literal["attention", "mlp"], kept: set[int], layers: int) -> dict[str, list[int]]:
        """The layers of a kind that a route keeps in 8 and 4 bits.

        Raises:
            SpecError: a layer is named that the verifier does not have.
        """
        asked: Bits | LayersByBits = getattr(self, kind)
        every, others = (self.bits, asked) if isinstance(asked, dict) else (asked, {})
        found = dict.fromkeys(range(layers), str(every))
        for bits, named in others.items():
            beyond = [layer for layer in named if layer not in found]
            if beyond:
                raise SpecError(
                    f"options of the part low_bit: {kind} names layer {beyond[0]}, the verifier has layers 0 to "
                    f"{layers - 1}"
                )
            found.update(dict.fromkeys(named, bits))
        low = {str(bits): [layer for layer in sorted(kept) if found[layer] == str(bits)] for bits in get_args(LowBits)}
        return {bits: named for bits, named in low.items() if named}


class MeasuredSublayer(BaseModel):
    """A sublayer, or the head, with so many bits.

    Attributes:
        kind: attention, mlp or head.
        layer: None for the head.
        kl: KL(q || q') where it alone has them, in nats a place.
        cost: share of a full pass's products.
        chosen: whether it has these.
    """

    kind: Literal["attention", "mlp", "head"]
    layer: int | None
    bits: Bits
    kl: float
    cost: float
    chosen: bool


class AskedChoice(BaseModel):
    """What bits were chosen for.

    Attributes:
        verifier: its name.
        kept: layers whose sublayers of each kind the route keeps.
        options: of the part.
    """

    verifier: str
    target_cost: float
    kept: dict[Literal["attention", "mlp"], list[int]]
    options: LowBitOptions


class MeasuredChoice(BaseModel):
    """What bits were chosen by: one row for each sublayer and number of bits.

    Attributes:
        relative_cost: of all products of the route over those of a full pass, as chosen.
        asked: what they were chosen for; None in what earlier releases wrote.
    """

    target_cost: float
    relative_cost: float
    measured: list[MeasuredSublayer]
    asked: AskedChoice | None = None

    def chosen(self) -> ChosenBits | None:
        """The bits that were chosen; None where everything keeps 16."""
        low = [row for row in self.measured if row.chosen and row.bits != 16]
        if not low:
            return None
        inputs = 16 if self.asked is None else self.asked.options.input_bits
        entry: dict[str, Any] = {"attention": {}, "mlp": {}, "head": None, "input_bits": inputs}
        for row in low:
            if row.layer is None:
                entry["head"] = row.bits
            else:
                entry[row.kind].setdefault(str(row.bits), []).append(row.layer)
        found = ChosenBits.model_validate(entry)
        found._table = self
        return found


class ChosenBits(LowBitWeights):
    """Bits that were chosen, with what they were chosen by."""

    _table: MeasuredChoice | None = PrivateAttr(None)

    @property
    def table(self) -> MeasuredChoice:
        """What was measured."""
        assert self._table is not None, "set where bits are chosen"
        return self._table


def kept_layers(inputs: FitInputs) -> dict[Literal["attention", "mlp"], set[int]]:
    """Layers whose sublayer of each kind a route keeps."""
    skipped = {"attention": inputs.route.attention_skip, "mlp": inputs.route.mlp_skip}
    return {kind: {*range(inputs.full.config.num_hidden_layers)}.difference(skipped[kind]) for kind in KINDS}


def _measured(inputs: FitInputs, options: LowBitOptions, asked: AskedChoice) -> MeasuredChoice:
    """The bits of least summed KL(q || q') within the fit's target cost, of kept sublayers and the head.

    Each is measured alone, all others as q has them; costs are those of products, without what attention does beside.
    """
    divergence = inputs.divergence
    if divergence is None or not inputs.texts:
        raise SpecError("bits auto needs texts that q wrote; give bits a number")
    full, kept = inputs.full, kept_layers(inputs)
    places: list[tuple[str, int | None]] = [
        (kind, layer) for layer in range(full.config.num_hidden_layers) for kind in KINDS if layer in kept[kind]
    ]
    places.append(("head", None))
    rows = full.head_rows()
    shapes: dict[tuple[str, int | None], list[Shape]] = {("head", None): [(rows.shape[0], rows.shape[1])]}
    for index, decoder_layer in enumerate(full.layers):
        for name in KINDS:
            linears = verifier_linears(decoder_layer.get_submodule(MODULES[name]))
            shapes[name, index] = [(one.linear.out_features, one.linear.in_features) for one in linears]
    tried = [*dict.fromkeys(options.options)]
    every = [shape for each in shapes.values() for shape in each]
    seconds = product_seconds(every, tried, full.device, options.input_bits)
    total = sum(seconds[shape, 16] for shape in every)
    count = len(inputs.texts)
    texts = sorted(random.Random(SEED).sample(range(count), min(TEXTS, count)))

    costs = [{bits: sum(seconds[one, bits] for one in shapes[place]) / total for bits in tried} for place in places]
    # A target that no choice meets is refused before divergences are measured, which takes minutes.
    choose_bits([{bits: MeasuredBits(0.0, one) for bits, one in cost.items()} for cost in costs], inputs.target_cost)

    def measure(kind: str, layer: int | None, bits: Bits, cost: float) -> MeasuredBits:
        if bits == 16:
            return MeasuredBits(0.0, cost)
        named = {"head": bits} if layer is None else {kind: {str(bits): [layer]}}
        alone = LowBitWeights.model_validate({**named, "input_bits": options.input_bits})
        model = RoutedModel(full.model, Route(), {"low_bit": alone})
        with widened_weights(model.slim_networks):
            return MeasuredBits(statistics.mean(divergence(model, number) for number in texts), cost)

    measured = [
        {bits: measure(*place, bits, one) for bits, one in cost.items()}
        for place, cost in zip(places, costs, strict=True)
    ]
    chosen = choose_bits(measured, inputs.target_cost)
    return MeasuredChoice(
        target_cost=inputs.target_cost,
        relative_cost=sum(module[bits].cost for module, bits in zip(measured, chosen, strict=True)),
        measured=[
            MeasuredSublayer.model_validate(
                {"kind": kind, "layer": layer, "bits": bits, **one._asdict(), "chosen": bits == mine}
            )
            for (kind, layer), module, mine in zip(places, measured, chosen, strict=True)
            for bits, one in module.items()
        ],
        asked=asked,
    )


def _choice(inputs: FitInputs, options: LowBitOptions) -> MeasuredChoice:
    """What was chosen for the same in the fit's folder, or is chosen now; the folder then holds it.

    A fit that goes on has to go on with the bits that it began with, and times differ from run to run.
    """
    kept = {kind: sorted(layers) for kind, layers in kept_layers(inputs).items()}
    name = str(inputs.full.config.name_or_path)
    options = options.model_copy(update={"rounding": "nearest"})  # by which bits are chosen, whatever they are for
    asked = AskedChoice(verifier=name, target_cost=inputs.target_cost, kept=kept, options=options)
    if inputs.folder is None:
        return _measured(inputs, options, asked)
    path = inputs.folder / MEASURED_FILE
    earlier = _read_choice(path)
    if earlier is not None and earlier.asked == asked:
        warnings.warn(f"bits are those of {path}; remove it to choose anew", JobWarning, stacklevel=2)
        return earlier
    found = _measured(inputs, options, asked)
    write_json(path, found)
    return found


def _read_choice(path: Path) -> MeasuredChoice | None:
    """What an earlier fit chose; None where it left nothing that can be read."""
    try:
        return read_json(MeasuredChoice, path, "viasd fit", SpecError)
    except SpecError:
        return None


@register
class LowBit(RoutePart[LowBitWeights | LearnedBits]):
    """Sublayers and a head in low bits; it holds its entry, for weights are made of q's own, or integers beside it."""

    name = "low_bit"
    title = "weights of low bits"
    contents = "which"
    options = LowBitOptions
    last = True

    def fit(self, inputs: FitInputs, options: PartOptions) -> LowBitWeights | LearnedBits | None:
        """What the options say, of the sublayers that the route keeps; None, with a warning, where all keep 16 bits."""
        assert isinstance(options, LowBitOptions)
        if options.rounding == "nearest":
            return self._bits(inputs, options)
        refuse_without_texts(inputs)  # before bits are chosen, which takes minutes
        entry = self._bits(inputs, options)
        return None if entry is None else LearnedBits(entry, learn_rounding(inputs, entry))

    def _bits(self, inputs: FitInputs, options: LowBitOptions) -> LowBitWeights | None:
        if options.bits == "auto":
            choice = _choice(inputs, options)
            chosen = choice.chosen()
            if chosen is None:
                warnings.warn(
                    f"bits auto leaves everything in 16 bits, whose products take {choice.relative_cost:.2f} of a full "
                    f"pass's and meet target_cost {choice.target_cost:g}: the route has no low bits; lower target_cost "
                    "for some",
                    JobWarning,
                    stacklevel=2,
                )
            return chosen
        kept, layers = kept_layers(inputs), inputs.full.config.num_hidden_layers
        head = options.bits if options.head is None else options.head
        named = {kind: options.by_bits(kind, kept[kind], layers) for kind in KINDS}
        if head == 16 and not any(named.values()):
            warnings.warn(
                "the route keeps none of the sublayers that low_bit names: it has no low bits; name others, or keep "
                "these (--model.keep_layers)",
                JobWarning,
                stacklevel=2,
            )
            return None
        return LowBitWeights.model_validate(
            {**named, "head": None if head == 16 else head, "input_bits": options.input_bits}
        )

    def save(
        self, held: LowBitWeights | LearnedBits, route: Route, folder: Path, options: PartOptions
    ) -> LowBitWeights:
        """Integers that were learned are written, and what bits were chosen by (:data:`MEASURED_FILE`)."""
        entry = held.entry if isinstance(held, LearnedBits) else held
        if isinstance(entry, ChosenBits):
            write_json(folder / MEASURED_FILE, entry.table)
            entry = LowBitWeights.model_validate(entry.model_dump())
        if not isinstance(held, LearnedBits):
            return entry
        if route.head_vocab is not None:
            held = held.with_outputs(read_head_ids(route.head_vocab, folder))
        return save_learned(held._replace(entry=entry), self.tensors_path(folder), folder)

    def load(self, route: Route, folder: Path, sizes: Sizes) -> LowBitWeights | LearnedBits:
        entry = route.low_bit
        assert entry is not None, "asked of a route with low bits"
        if entry.tensors is None:
            return entry
        return read_learned(route, folder / entry.tensors.path, sizes.vocab, sizes.hidden)

    def install(self, plan: SlimPlan, held: LowBitWeights | LearnedBits) -> None:
        """Round what other parts left of the named sublayers, in copies, or take the integers that are held for them.

        q's own modules stay as they are.
        """
        refuse_packed(plan.full.model)
        learned, entry = (held, held.entry) if isinstance(held, LearnedBits) else (None, held)
        if learned is None and entry.tensors is not None:
            raise ModelError(
                "the route names weights rounded by gptq, but not their integers; open it with load_routed"
            )
        layers = nn.ModuleList(share_parameters(layer) for layer in plan.layers)
        for kind in KINDS:
            for index, bits in entry.bits(kind).items():
                places = [*verifier_linears(layers[index].get_submodule(MODULES[kind]))]
                if learned is not None:
                    learned.put(sublayer_name(kind, index), places, bits, entry.input_bits)
                else:
                    name = f"layer-{index:03d}-{kind}" if _of_files(plan, places) else None
                    _round(plan, name, places, bits, entry.input_bits)
                give_freed_memory_back()  # codes that stay lie among numbers that went
        plan.layers = layers
        if entry.head is None:
            return
        name = "head" if plan.head is None else None  # a part of its rows is kept nowhere
        plan.head = plan.head or SlimHead(plan.full.head_rows())
        (place,) = plain_linears([plan.head])
        if learned is None:
            _round(plan, name, [place], entry.head, entry.input_bits)
            return
        if plan.head.ids is not None:
            learned = learned.with_outputs(plan.head.ids)
        weight = learned.weight(HEAD, place.linear, entry.head)
        place.put(LowBitLinear(place.linear, entry.head, entry.input_bits, weight))

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
        if entry.rule == "gptq":
            words.append("rounded by GPTQ")
        return ", ".join(words)

    def drawing(self, route: Route, layers: int) -> list[Mark]:
        assert route.low_bit is not None, "asked of a route with low bits"
        return [
            Mark(kind, layer, layer, f"in {bits} bits", bits / 16)
            for kind in KINDS
            for layer, bits in route.low_bit.bits(kind).items()
        ]


def _of_files(plan: SlimPlan, places: Sequence[LinearPlace[nn.Linear]]) -> bool:
    """Whether layers are those of the verifier's files: not what another part made of them, in another spec another."""
    source = layer_weights(plan.full.model)
    changed = any(isinstance(place.holder, LoRALinear) for place in places)
    return source is not None and not changed and source.has(place.linear.weight for place in places)


def _round(
    plan: SlimPlan, name: str | None, places: Sequence[LinearPlace[nn.Linear]], bits: LowBits, input_bits: InputBits
) -> None:
    """Exchange linear layers for low-bit ones.

    Args:
        name: of the file that keeps their codes, where their weights are q's own; None for those of other weights.
    """
    rounded = rounded_weights(plan.full.model, name, {place.path: place.linear for place in places}, bits)
    for place, weight in zip(places, rounded, strict=True):
        place.put(LowBitLinear(place.linear, bits, input_bits, weight))


def _counts(entry: LowBitWeights) -> Mapping[int, int]:
    """How many sublayers have so many bits."""
    every = [bits for kind in KINDS for bits in entry.bits(kind).values()]
    return {bits: every.count(bits) for bits in get_args(LowBits) if bits in every}
