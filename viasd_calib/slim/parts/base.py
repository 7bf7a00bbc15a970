"""What a part of a route is: one thing that q' does otherwise than q, in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from transformers import PreTrainedConfig

from viasd_calib.errors import ModelError, SpecError
from viasd_calib.schema.route import PartEntry, import_part, register_entry
from viasd_calib.spec import Route, VerifierRef

if TYPE_CHECKING:
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
    """

    name: ClassVar[str]
    title: ClassVar[str]
    contents: ClassVar[str]
    entry: ClassVar[type[PartEntry] | None] = None

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


def register(kind: type[Part]) -> type[Part]:
    """Class decorator: let routes have parts of this kind, by its name."""
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
    return [part_named("skips"), *(part_named(name) for name in route.entries())]


def route_words(route: Route, layers: int) -> str:
    """A line on a route.

    Example:
        >>> route_words(Route(mlp_skip=[3]), layers=5)
        '5 of 5 attention and 4 of 5 MLP sublayers kept'
    """
    return ", ".join(part.line(route, layers) for part in parts_of(route))


def load_parts(route: Route, folder: Path, sizes: Sizes) -> dict[str, object]:
    """What the parts of a route hold, by name, from the files beside a spec.

    Raises:
        SpecError: as :meth:`RoutePart.load` does.
    """
    return {name: part_named(name).load(route, folder, sizes) for name in route.entries()}


def install_parts(plan: SlimPlan, held: Mapping[str, object]) -> None:
    """Install the parts of a plan's route, and those that hold something without an entry in it yet.

    Args:
        held: what each part holds, by name.

    Raises:
        ModelError: a part of the route has nothing to install.
    """
    entries = plan.route.entries()
    part_named("skips").install(plan, None)
    for name in dict.fromkeys((*Route.model_fields, *entries, *held)):
        if held.get(name) is not None:
            part_named(name).install(plan, held[name])
        elif name in entries:
            part = part_named(name)
            raise ModelError(f"the route names {part.title}, but not {part.contents}; open it with load_routed")
