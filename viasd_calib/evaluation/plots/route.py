"""What q' runs of the full verifier: a map of layers and sublayers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.plots.style import MUTED, TIER_COLOURS, legend, one_panel
from viasd_calib.slim.parts.base import Mark, parts_of

if TYPE_CHECKING:
    from viasd_calib.spec import Route


_ROWS = {"mlp": 0.0, "attention": 1.0}
_ABOVE, _ABOVE_STEP = 2.12, 0.34


def route_map(route: Route, num_layers: int) -> Figure:
    """The route as a layer x sublayer map: filled where q' runs a sublayer, and over that what its parts draw.

    A sublayer that is left out is hatched, one that runs in part is filled in part; a part that draws bars above the
    map has a row of its own for them.
    """
    drawings = [part.drawing(route, num_layers) for part in parts_of(route)]
    bars = [marks for marks in ([mark for mark in drawn if mark.row == "above"] for drawn in drawings) if marks]
    cells: dict[tuple[str, int], float] = {
        (mark.row, layer): mark.share for marks in drawings for mark in marks for layer in _layers(mark)
    }
    figure, axes = one_panel(9.4, 1.55 + 0.25 * len(bars))
    for name, row in _ROWS.items():
        for layer in range(num_layers):
            axes.add_patch(_cell(layer, row, cells.get((name, layer), 1.0)))
    for row, marks in enumerate(bars):
        for mark in marks:
            axes.add_patch(_bar(mark, _ABOVE + row * _ABOVE_STEP))
    top = _ABOVE + _ABOVE_STEP * len(bars) + 0.04 if bars else 2.0
    axes.set(xlim=(-0.5, num_layers - 0.5), ylim=(-0.1, top), xlabel="decoder layer")
    axes.set_yticks([row + 0.45 for row in _ROWS.values()], ["MLP", "attention"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(num_layers, 16), integer=True))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    labels = {mark.label: mark for marks in drawings for mark in marks}
    kept = Patch(facecolor=TIER_COLOURS[Tier.ACCEPT], label="kept: q and q′ run it")
    legend(axes, handles=[kept, *map(_handle, labels.values())], ncols=3)
    return figure


def _layers(mark: Mark) -> range:
    return range(mark.first, mark.last + 1)


def _bar(mark: Mark, bottom: float) -> Rectangle:
    corner, width = (mark.first - 0.42, bottom), mark.last - mark.first + 0.84
    return Rectangle(corner, width, 0.22, facecolor=TIER_COLOURS[Tier.REGENERATE], edgecolor="none")


def _cell(layer: int, row: float, share: float) -> Rectangle:
    corner, width, height = (layer - 0.42, row), 0.84, 0.88
    if share == 0:
        return Rectangle(corner, width, height, facecolor="none", edgecolor=MUTED, linewidth=0.7, hatch="////")
    return Rectangle(corner, width, share * height, facecolor=TIER_COLOURS[Tier.ACCEPT], edgecolor="none")


def _handle(mark: Mark) -> Patch:
    """A legend's entry for marks like this one."""
    if mark.row == "above":
        return Patch(facecolor=TIER_COLOURS[Tier.REGENERATE], label=mark.label)
    if mark.share == 0:
        return Patch(facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0.7, label=mark.label)
    return Patch(facecolor=TIER_COLOURS[Tier.ACCEPT], alpha=mark.share, label=mark.label)
