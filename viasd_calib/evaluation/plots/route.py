"""What q' runs of the full verifier: a map of layers and sublayers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.plots.style import MUTED, TIER_COLOURS, legend, one_panel
from viasd_calib.slim.parts.skips import SkippedRun, skipped_runs

if TYPE_CHECKING:
    from viasd_calib.spec import Route


def route_map(route: Route, num_layers: int) -> Figure:
    """The route as a layer x sublayer map: filled where q' runs a sublayer, hatched where it skips one.

    Above it lies a bar for each bridge, over the layers of the run that it stands in for.
    """
    bridged = [] if route.bridges is None else skipped_runs(route)
    figure, axes = one_panel(9.4, 1.8 if bridged else 1.55)
    rows = (("MLP", 0, set(route.mlp_skip)), ("attention", 1, set(route.attention_skip)))
    for _, row, skipped in rows:
        for layer in range(num_layers):
            axes.add_patch(_cell(layer, row, layer in skipped))
    for run in bridged:
        axes.add_patch(_bridge(run))
    axes.set(xlim=(-0.5, num_layers - 0.5), ylim=(-0.1, 2.5 if bridged else 2.0), xlabel="decoder layer")
    axes.set_yticks([row + 0.45 for _, row, _ in rows], [name for name, _, _ in rows])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(num_layers, 16), integer=True))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    kept = Patch(facecolor=TIER_COLOURS[Tier.ACCEPT], label="kept: q and q′ run it")
    skips = Patch(facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0.7, label="skipped by q′")
    handles = [kept, skips]
    if bridged:
        handles.append(Patch(facecolor=TIER_COLOURS[Tier.REGENERATE], label="bridge, for the run below it"))
    legend(axes, handles=handles, ncols=3)
    return figure


def _bridge(run: SkippedRun) -> Rectangle:
    first, last = run.begin // 2, (run.end - 1) // 2
    return Rectangle(
        (first - 0.42, 2.12), last - first + 0.84, 0.22, facecolor=TIER_COLOURS[Tier.REGENERATE], edgecolor="none"
    )


def _cell(layer: int, row: int, skipped: bool) -> Rectangle:
    corner, width, height = (layer - 0.42, row), 0.84, 0.88
    if skipped:
        return Rectangle(corner, width, height, facecolor="none", edgecolor=MUTED, linewidth=0.7, hatch="////")
    return Rectangle(corner, width, height, facecolor=TIER_COLOURS[Tier.ACCEPT], edgecolor="none")
