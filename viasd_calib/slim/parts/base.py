"""What a part of a route is: one thing that q' does otherwise than q, in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedConfig

from viasd_calib.errors import ModelError, SpecError
from viasd_calib.files import copy_file
from viasd_calib.schema.route import PARTS_PACKAGE, PartEntry, import_part, register_entry
from viasd_calib.spec import AddedMemory, Route, TensorFile, VerifierRef, first_problem, tensor_file

if TYPE_CHECKING:
    from viasd_calib.slim.forward import RoutedModel
    from viasd_calib.slim.plan import SlimPlan

Held = TypeVar("Held")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a verifier that the tensors of parts have to fit.

    Attributes:
        neurons: of each MLP; None where it is not known.
    """

    layers: int
    hidden: int
    vocab: int
    neurons: int | None = None

    @classmethod
    def of_config(cls, config: PreTrainedConfig) -> Sizes:
        """Those of a model."""
        return cls(config.num_hidden_layers, config.hidden_size, config.vocab_size, config.intermediate_size)

    @classmethod
    def of_ref(cls, verifier: VerifierRef) -> Sizes:
        """Those that a spec tells of its verifier."""
        return cls(verifier.num_layers, verifier.hidden_size, verifier.vocab_size)


class PartOptions(BaseModel):
    """Base of the options with which a part is fitted; those that a part does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WrittenText(Protocol):
    """A text that q wrote: prompt and answer."""

    @property
    def ids(self) -> Tensor:
        """Prompt and answer, [length]."""
        ...

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        ...


Replay = Callable[["RoutedModel", Tensor, Sequence[int]], Tensor]
"""Runs q over ids ([batch, length]) and gives its residual stream before the sublayers of these numbers, which rise;
their count stands for the end: [batch, length, numbers, hidden]; ``viasd_calib.replay.teacher.read_residuals``."""

Divergence = Callable[["RoutedModel", int], float]
"""Mean KL(q || q') of a model's q', directly after q, on the text of this number, in nats a place."""


def generated_residuals(
    model: RoutedModel, text: WrittenText, numbers: Sequence[int], replay: Replay, lead: int = 0
) -> Tensor:
    """q's residual stream at the n places of a text where q wrote: [lead + n, numbers, hidden], float32.

    Args:
        numbers: of the sublayers it enters, as ``replay`` takes them.
        replay: runs q over the text.
        lead: places before those, to be given too; zeros before the text begins.
    """
    read = replay(model, text.ids[None, :-1].to(model.device), numbers)  # [1, length, numbers, hidden]
    begin = text.prompt_length - 1 - lead
    kept = read[0, max(begin, 0) :].float()
    return nn.functional.pad(kept, (0, 0, 0, 0, -begin, 0)) if begin < 0 else kept


@dataclass(frozen=True)
class FitInputs:
    """What a part is fitted on.

    Attributes:
        full: q, opened.
        route: as far as it has been found.
        texts: that q wrote.
        replay: runs q over them.
        divergence: of q' from q on one of the texts; None where nothing measures it.
        target_cost: share of a full pass that a slim pass may cost.
        folder: of the fit, where a part may leave what a fit that goes on is to take up; None where there is none.
    """

    full: RoutedModel
    route: Route
    texts: Sequence[WrittenText]
    replay: Replay
    divergence: Divergence | None = None
    target_cost: float = 1.0
    folder: Path | None = None


@dataclass(frozen=True)
class Mark:
    """What a map of the route shows of a part, over layers in a row.

    Attributes:
        row: of the map: the sublayers of this kind, or a row of the part's own above them.
        first: layer.
        last: layer, included.
        label: for the legend.
        share: of a sublayer that q' still runs; 0 for none of it. Above the sublayers it has no meaning.
    """

    row: Literal["attention", "mlp", "above"]
    first: int
    last: int
    label: str
    share: float = 1.0


class RoutePart(Generic[Held]):
    """One kind of thing that a route does; a file each in this package, or in one's own (:func:`register`).

    ``Held`` is what the part puts into q': modules, or tensors that they are made of.

    Attributes:
        name: of its entry in a spec's route, of its module in this package, and of its folder beside a spec.
        title: of what it is, for messages: "a head vocabulary".
        contents: of its tensors, for messages: "its ids".
        entry: its entry in a spec; None for a part whose entries are :class:`~viasd_calib.spec.Route`'s own.
        options: with which it is fitted.
        last: whether it is installed after all parts that do not say so: one that exchanges what others put there.
        replaces_runs: whether it has modules run in place of skipped runs
            (:meth:`~viasd_calib.slim.plan.SlimPlan.replace`), as one part of a route may.
        fit_has_options: whether ``viasd fit`` makes it by options of its own, and not by ``--model.parts``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    contents: ClassVar[str]
    entry: ClassVar[type[PartEntry] | None] = None
    options: ClassVar[type[PartOptions]] = PartOptions
    last: ClassVar[bool] = False
    replaces_runs: ClassVar[bool] = False
    fit_has_options: ClassVar[bool] = False

    def fit(self, inputs: FitInputs, options: PartOptions) -> Held | None:
        """Make what q' is to hold from texts, before distillation; ``options`` are of the part's own type.

        None where the texts show that the route is better without the part.
        """
        raise NotImplementedError(f"{self.title} cannot be fitted by itself")

    def parameters(self, held: Held, route: Route) -> list[nn.Parameter]:
        """What distillation trains of what q' runs: nothing, unless a part says otherwise.

        A part that has any holds a module of which they are parameters, and installs these very parameters.
        """
        return []

    def save(self, held: Held, route: Route, folder: Path, options: PartOptions) -> PartEntry:
        """Write tensors to :meth:`tensors_path` in a fit's folder, atomically; returns the entry that names them.

        Args:
            route: as far as it has been found.
            options: with which it was fitted.
        """
        raise NotImplementedError

    def load(self, route: Route, folder: Path, sizes: Sizes) -> Held:
        """Read what lies beside a spec, and check it.

        Args:
            route: with an entry of this part.
            folder: of the spec.

        Raises:
            SpecError: a file is missing or damaged, or does not fit route or sizes.
        """
        raise NotImplementedError

    def misfits(self, route: Route, folder: Path, sizes: Sizes) -> Iterator[str]:
        """What is wrong with the tensors beside a spec, as far as it shows without the verifier: a line each."""
        try:
            self.load(route, folder, sizes)
        except SpecError as error:
            yield str(error)

    def install(self, plan: SlimPlan, held: Held) -> None:
        """Put what was loaded or fitted into the plan of what q' runs.

        Raises:
            SpecError: it does not fit the verifier.
            ModelError: the verifier has been prepared for a backend that the part cannot run on.
        """
        raise NotImplementedError

    def tensors_path(self, folder: Path) -> Path:
        """Where a fit in ``folder`` keeps its tensors."""
        return folder / f"{self.name}.safetensors"

    def line(self, route: Route, layers: int) -> str:
        """A few words on the part, for a list of all parts of a route.

        Args:
            route: with an entry of this part.
            layers: of the verifier.
        """
        return f"with {self.title}"

    def drawing(self, route: Route, layers: int) -> list[Mark]:
        """What a map of the route shows of the part: nothing, unless a part says otherwise; arguments as for lines."""
        return []


Part = RoutePart[Any]
_PARTS: dict[str, Part] = {}
SKIPS = ("attention_skip", "mlp_skip")
"""Entries of a route's part ``skips``."""


def register(kind: type[Part]) -> type[Part]:
    """Class decorator: let routes have parts of this kind, by its name.

    Raises:
        ValueError: it has no name, or one that another part or an entry of :class:`~viasd_calib.spec.Route` has.
    """
    name = getattr(kind, "name", "")
    if not name:
        raise ValueError(f"the part {kind.__name__} has no name; give it the attribute name")
    other = type(_PARTS[name]) if name in _PARTS else kind
    same = (other.__module__, other.__qualname__) == (kind.__module__, kind.__qualname__)
    if not same or (name in Route.model_fields and kind.__module__ != f"{PARTS_PACKAGE}.{name}"):
        raise ValueError(f"routes have {name!r} already; give the part {kind.__name__} another name")
    _PARTS[kind.name] = kind()
    if kind.entry is not None:
        register_entry(kind.name, kind.entry)
    return kind


def part_named(name: str) -> Part:
    """The part of this name.

    Raises:
        SpecError: there is none.

    Example:
        >>> part_named("head_vocab").title
        'a head vocabulary'
    """
    if name not in _PARTS:
        import_part(name)
    if name not in _PARTS:
        raise SpecError(f"{name!r} is no part of a route that this release knows; install the package that has it")
    return _PARTS[name]


def parts_of(route: Route) -> list[Part]:
    """The parts of a route, in the order in which they are installed.

    Example:
        >>> [part.name for part in parts_of(Route(mlp_skip=[3]))]
        ['skips']
    """
    return [part_named("skips"), *sorted(map(part_named, route.entries()), key=lambda part: part.last)]


def route_words(route: Route, layers: int) -> str:
    """A line on a route.

    Example:
        >>> route_words(Route(mlp_skip=[3]), layers=5)
        '5 of 5 attention and 4 of 5 MLP sublayers kept'
    """
    lines = [part.line(route, layers) for part in parts_of(route)]
    if route.memory is not None:
        lines.append(memory_words(route.memory))
    return ", ".join(lines)


def memory_words(memory: AddedMemory) -> str:
    """What q' takes beside q.

    Example:
        >>> memory_words(AddedMemory(bytes=67_000_000, share=0.5))
        "0.5 of q's memory more (67.0 MB)"
        >>> memory_words(AddedMemory(bytes=0, share=0.0))
        'no memory beside that of q'
    """
    if memory.bytes == 0:
        return "no memory beside that of q"
    return f"{memory.share:.2g} of q's memory more ({memory.bytes / 1e6:,.1f} MB)"


def load_parts(route: Route, folder: Path, sizes: Sizes) -> dict[str, object]:
    """What the parts of a route hold, by name, from the files beside a spec.

    Raises:
        SpecError: as :meth:`RoutePart.load` does.
    """
    return {name: part_named(name).load(route, folder, sizes) for name in route.entries()}


def options_of(asked: Mapping[str, Mapping[str, Any]]) -> dict[str, PartOptions]:
    """Options of parts that a fit is told to add, by their names.

    Raises:
        SpecError: there is no such part, it has no such options, or the fit has options for it already.
    """
    checked: dict[str, PartOptions] = {}
    for name, given in asked.items():
        if name in SKIPS or part_named(name).fit_has_options:
            raise SpecError(f"{name} is a part that viasd fit has options of its own for; leave it out of parts")
        try:
            checked[name] = part_named(name).options.model_validate(given)
        except ValidationError as error:
            raise SpecError(f"options of the part {name}: {first_problem(error)}") from error
    return checked


def save_parts(route: Route, held: Mapping[str, object], options: Mapping[str, PartOptions], folder: Path) -> Route:
    """Write the tensors of parts into a fit's folder; returns the route with their entries.

    Args:
        held: what each part holds, by its name; None for nothing.
        options: with which they were fitted, by name; a part that is not named has none.
    """
    for name, found in held.items():
        if found is not None:
            entry = part_named(name).save(found, route, folder, options.get(name, PartOptions()))
            route = route.model_copy(update={name: entry})
    return route


def fit_parts(inputs: FitInputs, options: Mapping[str, PartOptions]) -> dict[str, Any]:
    """What parts hold, by name, once they are fitted with these options."""
    return {name: part_named(name).fit(inputs, asked) for name, asked in options.items()}


def copy_parts(route: Route, source: Path, folder: Path) -> Route:
    """The route with the tensor files of its parts copied into a folder for each part.

    Args:
        source: folder that the route's files lie in now.
        folder: of the spec that the route is copied for.
    """
    copied: dict[str, PartEntry] = {}
    for name, entry in route.entries().items():
        files: dict[str, TensorFile] = {}
        for field, file in entry.files.items():
            target = folder / name / Path(file.path).name
            copy_file(source / file.path, target)
            files[field] = tensor_file(target, folder)
        copied[name] = entry.model_copy(update=files)
    return route.model_copy(update=copied)


def install_parts(plan: SlimPlan, held: Mapping[str, object]) -> None:
    """Install the parts of a plan's route, and those that hold something without an entry in it yet.

    Args:
        held: what each part holds, by name.

    Raises:
        ModelError: a part of the route has nothing to install.
    """
    part_named("skips").install(plan, None)
    entries = plan.route.entries()
    named = dict.fromkeys((*Route.model_fields, *entries, *held))
    parts = [part_named(name) for name in named if name in entries or held.get(name) is not None]
    for part in sorted(parts, key=lambda part: part.last):
        if held.get(part.name) is None:
            raise ModelError(f"the route names {part.title}, but not {part.contents}; open it with load_routed")
        part.install(plan, held[part.name])
