"""Where reading layers for each pass makes three tiers pay: speed-up against what a full pass costs over a slim one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from viasd_calib.calibration.paired import Interval
from viasd_calib.evaluation.plots.style import (
    DASHES,
    INK,
    METHOD_COLOURS,
    METHOD_MARKERS,
    MUTED,
    SMALL,
    method_label,
    one_panel,
    plain,
)

ASIDE = 0.055
"""Least distance of two names above the axes, as a share of their width."""


class CostPoint(NamedTuple):
    """Methods at one speed of reading.

    Attributes:
        name: of the speed.
        cost_ratio: seconds of a full pass over one new token, over those of a slim one.
        simulated: whether reading was slowed down.
        speedups: over speculative decoding, the prompts' own passes left out, by method.
    """

    name: str
    cost_ratio: float
    simulated: bool
    speedups: dict[str, Interval]


def read_off(points: Sequence[CostPoint], cost_ratio: float) -> dict[str, float]:
    """Speed-ups on the lines between measured points, by method; a method whose line ends before has none.

    Lines are straight over the logarithm of the ratio, as the picture draws them.

    Example:
        >>> def point(ratio):
        ...     speed = Interval(median=ratio, low=None, high=None, n=1)
        ...     return CostPoint("", ratio, True, {"three_tier": speed})
        >>> points = [point(1.0), point(4.0)]
        >>> read_off(points, 2.0), read_off(points, 5.0)
        ({'three_tier': 2.5}, {})
    """
    found = {}
    for name in sorted({name for point in points for name in point.speedups}):
        line = sorted((point.cost_ratio, point.speedups[name].median) for point in points if name in point.speedups)
        for (low, before), (high, after) in pairwise(line):
            if low <= cost_ratio <= high and low < high:
                share = math.log(cost_ratio / low) / math.log(high / low)
                found[name] = before + share * (after - before)
                break
    return found


def speedup_against_cost(points: Sequence[CostPoint], machine: float | None = None) -> Figure:
    """Speed-up over tuned speculative decoding against the ratio of the costs of passes, with 95 % intervals.

    Filled marks are of this machine as it is, open ones of reading slowed down, which is *simulated*.

    Args:
        points: one at least.
        machine: the ratio that a latency profile of a machine has, drawn as a line; what is decoded at which speed
            there was not measured, but is read off the lines where they reach it.
    """
    figure, axes = one_panel(5.6, 4.1)
    ordered = sorted(points, key=lambda point: point.cost_ratio)
    for name in sorted({name for point in points for name in point.speedups}):
        _draw_method(axes, name, [point for point in ordered if name in point.speedups])
    axes.axhline(1, color=INK, linewidth=0.8, linestyle="dotted")
    if machine is not None:
        axes.axvline(machine, color=MUTED, linewidth=1, linestyle=DASHES, label="a profile's machine (not decoded)")
        for name, speed in read_off(points, machine).items():
            axes.plot([machine], [speed], "x", color=METHOD_COLOURS.get(name, INK), markersize=7)
    axes.set(xscale="log", xlabel="cost of a full pass over that of a slim one (one new token)",
             ylabel="tokens per second over\ntuned speculative decoding")  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    _name_points(axes, ordered)
    handles, labels = axes.get_legend_handles_labels()
    for simulated, words in ((True, "reading slowed down (simulated)"), (False, "this machine as it is")):
        if any(point.simulated == simulated for point in points):
            fill: Literal["none", "full"] = "none" if simulated else "full"
            handles.append(Line2D([], [], color=MUTED, marker="o", markersize=6, fillstyle=fill, linestyle="none"))
            labels.append(words)
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=SMALL, labelcolor=INK,
                  handletextpad=0.5, columnspacing=1.4)  # fmt: skip
    return figure


def _draw_method(axes: Axes, name: str, points: Sequence[CostPoint]) -> None:
    """A line through points of rising ratio, and a mark with its interval at each."""
    colour = METHOD_COLOURS.get(name, INK)
    axes.plot(
        [point.cost_ratio for point in points], [point.speedups[name].median for point in points],
        color=colour, linewidth=1.2,
    )  # fmt: skip
    for point in points:
        one = point.speedups[name]
        if one.bounds is not None:
            axes.plot([point.cost_ratio] * 2, one.bounds, color=colour, linewidth=1, alpha=0.6)
        axes.plot([point.cost_ratio], [one.median], METHOD_MARKERS.get(name, "D"), color=colour, markersize=6,
                  fillstyle="none" if point.simulated else "full",
                  label=plain(method_label(name)) if point is points[-1] else None)  # fmt: skip


def _name_points(axes: Axes, ordered: Sequence[CostPoint]) -> None:
    """Write the speeds' names above the axes, over their points or, where these are close, a little to the right."""
    low, high = (math.log(bound) for bound in axes.get_xlim())
    place = -math.inf
    for point in ordered:
        own = (math.log(point.cost_ratio) - low) / (high - low)
        place = max(own, place + ASIDE)
        axes.annotate(
            plain(point.name), (own, 1.0), (place, 1.035), xycoords="axes fraction", textcoords="axes fraction",
            rotation=45, ha="left", va="bottom", fontsize=SMALL, color=MUTED, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
