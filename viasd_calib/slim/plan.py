"""The plan of what q' runs: made as q is, then changed by each part of a route in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from viasd_calib.errors import SpecError
from viasd_calib.slim.families import LayerType
from viasd_calib.spec import Route

if TYPE_CHECKING:
    from viasd_calib.slim.forward import RoutedModel
    from viasd_calib.slim.parts.head_vocab import SlimHead

SublayerKind = Literal["attention", "mlp", "bridge"]


MODULES: Mapping[SublayerKind, str] = {"attention": "self_attn", "mlp": "mlp"}
"""Names of the modules that sublayers run in a decoder layer, beside its norms."""
KINDS: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
"""Of the sublayers of a decoder layer, in the order they run."""


@dataclass(frozen=True)
class Sublayer:
    """One attention or MLP sublayer of a decoder layer, or what replaces a run of them.

    Attributes:
        index: of the decoder layer; of the first one that a bridge replaces.
        layer: the decoder layer, or the bridge.
        end: number of the sublayer that runs after it in q (:class:`~viasd_calib.slim.parts.skips.SkippedRun`).
    """

    kind: SublayerKind
    index: int
    layer: nn.Module
    layer_type: LayerType
    end: int

    @property
    def cost_key(self) -> tuple[object, ...]:
        """What its time hangs on: its kind, and the attribute ``cost_key`` of each module in it that has one.

        A part whose modules cost other than q's gives them this attribute: sublayers of equal keys are timed once
        (:func:`~viasd_calib.slim.cost.sublayer_costs`).

        Example:
            >>> layer = nn.ModuleDict({"mlp": nn.Sequential(nn.Identity(), nn.Identity())})
            >>> layer["mlp"][1].cost_key = "4 bits"
            >>> Sublayer("mlp", 0, layer, "full_attention", 2).cost_key
            ('mlp', '4 bits')
        """
        module = self.layer.get_submodule(MODULES.get(self.kind, ""))
        return (self.kind, *(one.cost_key for one in module.modules() if hasattr(one, "cost_key")))


class StandIn(nn.Module):
    """What q' runs in place of a run of sublayers.

    ``forward`` gives what the run would have added to the residual stream: [..., hidden] -> [..., hidden].
    """

    def token_shift(self, stream: Tensor) -> Tensor:
        """What is added to that from the stream after the run at the previous token: [..., hidden] -> [..., hidden].

        Asked only of a module whose run's end is among :attr:`SlimPlan.kept_streams`.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no state of the previous token")


class SlimPlan:
    """What q' runs. Sublayers are counted as in :class:`~viasd_calib.slim.parts.skips.SkippedRun`.

    Args:
        layers: q's own.
        layer_types: of each layer.
        route: whose parts are installed.
        full: q, opened; None where a list of sublayers is all that is wanted.

    Attributes:
        layers: the layers whose sublayers q' runs; a part that changes modules puts copies here
            (:func:`share_parameters`), so that q's own stay as they are.
        skipped: numbers of the sublayers that q' leaves out.
        stand_ins: what runs in place of skipped sublayers, by the first one's number: the number after the last one,
            the module, and the part that it is of; :meth:`replace` puts it here.
        kept_streams: numbers of the sublayers before which passes keep the residual stream in the cache, one slot each.
        head: the output head of q'; None for q's own.
        networks: further modules for a backend to prepare, beside layers and head.

    Example:
        >>> plan = SlimPlan(nn.ModuleList([nn.Identity()]), ["full_attention"])
        >>> plan.skipped.add(0)
        >>> [(sublayer.kind, sublayer.index) for sublayer in plan.sublayers()]
        [('mlp', 0)]
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        layer_types: Iterable[LayerType],
        route: Route | None = None,
        full: RoutedModel | None = None,
    ) -> None:
        self._own_layers = layers
        self.layers: Sequence[nn.Module] | nn.ModuleList = layers
        self._layer_types = [*layer_types]
        self._full = full
        self.route = route or Route()
        self.skipped: set[int] = set()
        self.stand_ins: dict[int, tuple[int, StandIn, str]] = {}
        self.kept_streams: list[int] = []
        self.head: SlimHead | None = None
        self.networks: list[nn.Module] = []

    @property
    def full(self) -> RoutedModel:
        """q, opened."""
        assert self._full is not None, "a plan for passes is made of an opened model"
        return self._full

    def place(self, module: nn.Module) -> None:
        """Bring a module to where q's weights are, in their number format."""
        if self._full is not None:
            module.to(device=self._full.device, dtype=self._full.dtype)

    def replace(self, begin: int, end: int, module: StandIn, part: str) -> None:
        """Let a module run in place of a run of sublayers, none of which runs then.

        Args:
            begin: number of the first one.
            end: number after the last one.
            part: name of the part that puts it there.

        Raises:
            SpecError: another part has replaced one of them.

        Example:
            >>> plan = SlimPlan(nn.ModuleList([nn.Identity()]), ["full_attention"])
            >>> plan.replace(0, 2, StandIn(), "bridges")
            >>> [(sublayer.kind, sublayer.end) for sublayer in plan.sublayers()]
            [('bridge', 2)]
        """
        numbers = range(begin, end)
        replaced = {number: name for first, (last, _, name) in self.stand_ins.items() for number in range(first, last)}
        both = [number for number in numbers if number in replaced]
        if both:
            other = replaced[both[0]]
            mend = "fit again with --model.bridges false, or leave the other part out of --model.parts"
            if "bridges" not in (other, part):
                mend = "fit again with one of them out of --model.parts"
            named = f"sublayers {both[0]} to {both[-1]}" if len(both) > 1 else f"sublayer {both[0]}"
            raise SpecError(f"{other} and {part} both replace {named}; {mend}")
        self.skipped.update(numbers)
        self.stand_ins[begin] = end, module, part

    def sublayers(self) -> list[Sublayer]:
        """What q' runs, in order."""
        planned: list[Sublayer] = []
        for index, (layer, layer_type) in enumerate(zip(self.layers, self._layer_types, strict=True)):
            for number, kind in enumerate(KINDS, start=2 * index):
                if number in self.stand_ins:
                    end, module, _ = self.stand_ins[number]
                    planned.append(Sublayer("bridge", index, module, layer_type, end))
                elif number not in self.skipped:
                    planned.append(Sublayer(kind, index, layer, layer_type, number + 1))
        return planned

    def run_modules(self) -> list[nn.Module]:
        """Every module that q' runs, head and norms among them, and none of a sublayer that it leaves out."""
        found = [*self.networks, *([] if self.head is None else [self.head])]
        for sublayer in self.sublayers():
            if sublayer.kind == "bridge":
                found.append(sublayer.layer)
            else:
                others = {*MODULES.values()} - {MODULES[sublayer.kind]}
                found += [module for name, module in sublayer.layer.named_children() if name not in others]
        return found

    def own_networks(self) -> tuple[nn.Module, ...]:
        """What q' runs beside q's own modules."""
        layers = () if self.layers is self._own_layers else tuple(self.layers)
        heads = () if self.head is None else (self.head,)
        return (*layers, *self.networks, *heads)


def share_parameters(module: nn.Module) -> nn.Module:
    """A copy of a module's structure that holds the very same parameters.

    What a part changes is changed in the copy, so that q's own modules stay as they are.
    """
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)
