"""Where reading layers for each pass makes three tiers pay: speed-up against what a full pass costs over a slim one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.plots.style import (
    INK,
    METHOD_COLOURS,
    METHOD_MARKERS,
    legend,
    method_label,
    one_panel,
    plain,
)


class CostPoint(NamedTuple):
    """Methods at one speed of reading.

    Attributes:
        cost_ratio: seconds of a full pass over one new token, over those of a slim one.
        simulated: whether reading was slowed down.
        speedups: over speculative decoding, the prompts' own passes left out, by method.
    """

    cost_ratio: float
    simulated: bool
    speedups: dict[str, Interval]


def speedup_against_cost(points: Sequence[CostPoint]) -> Figure:
    """Speed-up over tuned speculative decoding against the ratio of the costs of passes, with 95 % intervals.

    Filled marks are of this machine as it is, open ones of reading slowed down.
    """
    figure, axes = one_panel(5.2, 3.7)
    names = sorted({name for point in points for name in point.speedups})
    ordered = sorted(points, key=lambda point: point.cost_ratio)
    for name in names:
        colour = METHOD_COLOURS.get(name, INK)
        own = [(point, point.speedups[name]) for point in ordered if name in point.speedups]
        axes.plot([point.cost_ratio for point, _ in own], [one.median for _, one in own], color=colour, linewidth=1.2)
        for point, one in own:
            bounds = one.bounds
            if bounds is not None:
                axes.plot([point.cost_ratio] * 2, bounds, color=colour, linewidth=1, alpha=0.6)
            axes.plot([point.cost_ratio], [one.median], METHOD_MARKERS.get(name, "D"), color=colour, markersize=6,
                      fillstyle="none" if point.simulated else "full",
                      label=plain(method_label(name)) if point is own[-1][0] else None)  # fmt: skip
    axes.axhline(1, color=INK, linewidth=0.8, linestyle="dotted")
    axes.set(xscale="log", xlabel="cost of a full pass over that of a slim one (one new token)",
             ylabel="tokens per second over\nspeculative decoding")  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    legend(axes, ncols=2)
    return figure
