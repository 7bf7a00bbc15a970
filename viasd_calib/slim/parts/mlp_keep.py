"""MLP width: sublayers of q' that run with some of the full verifier's neurons.

A neuron of a gated MLP (Shazeer 2020, arXiv 2002.05202) is a row of its gate and up projections and a column of its
down projection, and the sum over neurons does not care for their order. So q's neurons are put, once, into an order
with those that q' keeps first: q gives what it did, up to the rounding of that sum, and what q' reads are prefixes of
q's own weights, which take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from viasd_calib.errors import ModelError, SpecError
from viasd_calib.files import write_bytes
from viasd_calib.slim.linears import linear_of
from viasd_calib.slim.onednn_linear import refuse_packed
from viasd_calib.slim.parts.base import FitInputs, Mark, PartOptions, Replay, RoutePart, Sizes, WrittenText, register
from viasd_calib.slim.plan import SlimPlan, share_parameters
from viasd_calib.slim.tensors import read_tensors
from viasd_calib.spec import MlpWidths, Route, tensor_file

if TYPE_CHECKING:
    from viasd_calib.slim.forward import RoutedModel

ORDER = "neuron_order"
"""Name of the buffer in which an MLP notes the order that its neurons are in; it is not saved with the model."""


class KeptNeurons(NamedTuple):
    """What q' runs of one MLP.

    Attributes:
        order: of all its neurons, as the verifier's own file counts them, [intermediate], integers.
        keep: how many of them run, the first ones.
    """

    order: Tensor
    keep: int


class NarrowMLP(nn.Module):
    """The first neurons of a gated MLP, on views of its weights: down(act(gate x) * up x).

    Backend ``packed`` cannot read a prefix of a packed weight: it packs each of these a second time, 3 * keep * hidden
    numbers, and until that is done q's plain weights stay beside the packed ones.

    Args:
        gate: [..., hidden] -> [..., keep].
        up: the same.
        down: [..., keep] -> [..., hidden].
        act: on each number.
    """

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # Named as in the families' own modules: adapters and backends go by these names.
        self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down
        self.act_fn = act
        self.cost_key = self.keep = down.in_features

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


def neuron_order(mlp: Any) -> Tensor:
    """The order that an MLP's neurons are in, as the verifier's own file counts them: [intermediate], long."""
    order: Tensor | None = getattr(mlp, ORDER, None)
    return torch.arange(mlp.down_proj.in_features, device=mlp.down_proj.weight.device) if order is None else order


@torch.no_grad()
def order_neurons(mlp: nn.Module, order: Tensor) -> None:
    """Put the neurons of an MLP of q into ``order`` ([intermediate], as the verifier's own file counts them).

    Its parameters are exchanged, not written into: whoever else holds the old ones (an adapter of another spec, a
    prefix of another order) goes on reading what it was made for, and keeps their memory alive. A model that is saved
    after that is another file: specs that name neurons go with the first one.

    Raises:
        ModelError: its layers are no plain linear ones.

    Example:
        >>> mlp = NarrowMLP(nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2), nn.functional.silu)
        >>> inputs = torch.ones(1, 2)
        >>> before, first = mlp(inputs), mlp.up_proj.weight[0]
        >>> order_neurons(mlp, torch.tensor([2, 0, 1]))
        >>> torch.allclose(mlp(inputs), before), torch.equal(mlp.up_proj.weight[1], first)
        (True, True)
    """
    entering, down = _entering(mlp), _plain(mlp, "down_proj")
    now = neuron_order(mlp)
    order = order.to(now)
    if torch.equal(now, order):
        return
    moved = now.argsort()[order]  # where each neuron is now
    for linear in entering:
        halves = linear.out_features // len(moved)  # gate and up in one
        rows = torch.cat([moved + half * len(moved) for half in range(halves)])
        linear.weight = _taken(linear.weight, rows, 0)
        if linear.bias is not None:
            linear.bias = _taken(linear.bias, rows, 0)
    down.weight = _taken(down.weight, moved, 1)
    mlp.register_buffer(ORDER, order, persistent=False)


def narrow_layers(layers: Iterable[nn.Module], widths: Mapping[int, KeptNeurons]) -> nn.ModuleList:
    """Copies of q's layers that share its parameters, some with narrow MLPs; q's neurons are put into order for them.

    Args:
        layers: q's own.
        widths: of the MLPs that are narrow, by layer.

    Raises:
        ModelError: an MLP's layers are no plain linear ones.
    """
    own: list[Any] = [*layers]
    for index, kept in widths.items():
        order_neurons(own[index].mlp, kept.order)
    copies = [share_parameters(layer) for layer in own]
    for index, kept in widths.items():
        copies[index].mlp = _prefix(own[index].mlp, kept.keep)
    return nn.ModuleList(copies)


def _prefix(mlp: Any, keep: int) -> NarrowMLP:
    """The first neurons of an MLP."""
    gate, up = (
        linear_of(weight[:keep], None if bias is None else bias[:keep])
        for linear in _entering(mlp)
        for weight, bias in _parts(linear, mlp.down_proj.in_features)
    )
    down = linear_of(mlp.down_proj.weight.detach()[:, :keep], mlp.down_proj.bias)
    return NarrowMLP(gate, up, down, mlp.activation_fn if hasattr(mlp, "gate_up_proj") else mlp.act_fn)


def _parts(linear: nn.Linear, neurons: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of each projection in a layer: one, or gate and up where a family has fused them."""
    weights = linear.weight.detach().split(neurons)
    biases = [None] * len(weights) if linear.bias is None else linear.bias.detach().split(neurons)
    return [*zip(weights, biases, strict=True)]


def _entering(mlp: nn.Module) -> list[nn.Linear]:
    """The layers whose outputs are gate and up, in this order: two, or one where a family has fused them."""
    names = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
    return [_plain(mlp, name) for name in names]


def _plain(mlp: nn.Module, name: str) -> nn.Linear:
    layer = getattr(mlp, name)
    if type(layer) is not nn.Linear:
        raise ModelError(
            f"the verifier's {name} is a {type(layer).__name__}, whose neurons cannot be put into order; "
            "load the verifier anew, with plain weights"
        )
    return layer


def _taken(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)


def save_widths(widths: Mapping[int, KeptNeurons], path: Path, folder: Path) -> MlpWidths:
    """Write orders of neurons to ``path``, atomically.

    Args:
        widths: by layer.
        folder: of the spec that will name the file.

    Returns:
        How that spec names it.
    """
    write_bytes(path, save({str(layer): kept.order.to(torch.int32).cpu() for layer, kept in widths.items()}))
    return MlpWidths(keep={layer: kept.keep for layer, kept in widths.items()}, tensors=tensor_file(path, folder))


class _Excitement:
    """Sums what enters an MLP's down projection at the places of texts, in one number for each neuron."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp
        self.sums = torch.zeros(mlp.down_proj.in_features, dtype=torch.float64)

    def add(self, begin: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take the places of one text from ``begin`` on, as a hook of the down projection."""
        self.sums += inputs[0][0, begin:].abs().double().sum(0).cpu()  # [intermediate]

    def ranked(self) -> Tensor:
        """The neurons, most important first, as the verifier's own file counts them: [intermediate], long."""
        reach = self.mlp.down_proj.weight.detach().double().norm(dim=0).cpu()  # [intermediate]
        order = (self.sums * reach).argsort(descending=True, stable=True)
        return neuron_order(self.mlp).cpu()[order]


@torch.no_grad()
def rank_neurons(
    model: RoutedModel, layers: Iterable[int], texts: Iterable[WrittenText], replay: Replay
) -> dict[int, Tensor]:
    """Rank the neurons of some MLPs by mean |act(gate) * up| at the places where q wrote, times their column's norm.

    The score of Wanda (Sun et al. 2023, arXiv 2306.11695, equation 1), activation times weight, for a whole neuron in
    place of a single weight, and with the activations' mean size in place of their norm.

    Args:
        model: q.
        layers: whose MLPs are ranked.
        replay: runs q over the texts.

    Returns:
        By layer, its neurons, most important first, as the verifier's own file counts them: [intermediate], long.
    """
    found = {layer: _Excitement(model.layers[layer].mlp) for layer in layers}
    for text in texts:
        with ExitStack() as hooks:
            for one in found.values():
                hook = partial(one.add, text.prompt_length - 1)
                hooks.callback(one.mlp.down_proj.register_forward_pre_hook(hook).remove)
            replay(model, text.ids[None, :-1].to(model.device), [len(model.full_sublayers)])
    return {layer: one.ranked() for layer, one in found.items()}


class MlpKeepOptions(PartOptions):
    """Layers whose MLPs are narrow, and how many neurons each of these has."""

    layers: tuple[int, ...]
    keep: int = Field(ge=1)


@register
class MlpKeep(RoutePart[Mapping[int, KeptNeurons] | nn.ModuleList]):
    """Narrow MLPs: the neurons that are kept, by layer, or layers that have narrow MLPs already."""

    name = "mlp_keep"
    title = "widths of MLPs"
    contents = "their neurons"
    fit_has_options = True
    options = MlpKeepOptions

    def fit(self, inputs: FitInputs, options: PartOptions) -> dict[int, KeptNeurons]:
        """The neurons that :func:`rank_neurons` puts first."""
        assert isinstance(options, MlpKeepOptions)
        ranked = rank_neurons(inputs.full, options.layers, inputs.texts, inputs.replay)
        return {layer: KeptNeurons(order, options.keep) for layer, order in ranked.items()}

    def save(
        self, held: Mapping[int, KeptNeurons] | nn.ModuleList, route: Route, folder: Path, options: PartOptions
    ) -> MlpWidths:
        assert not isinstance(held, nn.ModuleList), "an order of neurons is saved, not the layers"
        return save_widths(held, self.tensors_path(folder), folder)

    def load(self, route: Route, folder: Path, sizes: Sizes) -> dict[int, KeptNeurons]:
        entry = route.mlp_keep
        assert entry is not None, "asked of a route with narrow MLPs"
        path, keep = folder / entry.tensors.path, entry.keep
        orders = read_tensors(path, "orders of neurons")
        if orders.keys() != {str(layer) for layer in keep}:
            raise SpecError(
                f"{path} is of layers {', '.join(sorted(orders))}, route.mlp_keep names others; export the spec again"
            )
        for layer, kept in keep.items():
            order = orders[str(layer)]
            count = order.numel() if sizes.neurons is None else sizes.neurons
            if kept >= count:
                raise SpecError(
                    f"route.mlp_keep keeps {kept} neurons of layer {layer}, the verifier has {count}; "
                    f"give 1 to {count - 1}, or leave the layer out"
                )
            if order.is_floating_point() or not torch.equal(order.long().sort().values, torch.arange(count)):
                raise SpecError(
                    f"{path}: layer {layer} must name neurons 0 to {count - 1} once each; export the spec again"
                )
        return {layer: KeptNeurons(orders[str(layer)].long(), kept) for layer, kept in keep.items()}

    def install(self, plan: SlimPlan, held: Mapping[int, KeptNeurons] | nn.ModuleList) -> None:
        """Put q's neurons into the order of the route, and let q' run the first ones."""
        if not isinstance(held, nn.ModuleList):
            refuse_packed(plan.full.model)
            held = narrow_layers(plan.layers, held).eval().requires_grad_(False)
        plan.layers = held

    def line(self, route: Route, layers: int) -> str:
        assert route.mlp_keep is not None, "asked of a route with narrow MLPs"
        widths = route.mlp_keep.keep.values()
        ends = dict.fromkeys((min(widths), max(widths)))  # once where they are equal
        return f"{len(widths)} of them narrow ({' to '.join(f'{width:,}' for width in ends)} neurons)"

    def drawing(self, route: Route, layers: int) -> list[Mark]:
        return [Mark("mlp", layer, layer, "narrow: some of its neurons", 0.5) for layer in sorted(route.narrowed)]
