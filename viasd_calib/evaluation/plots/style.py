"""The look of all pictures: colours, type, axes, and how a figure becomes a file or a part of a page.

A figure is drawn in the colours of the light theme. ``inline_svg`` turns these colours into the CSS
variables of the page, so that one picture reads well on light and on dark ground. The colours are told
apart by people who are colour-blind, and shape, hatching or position shows the same again.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.pictures import picture_format
from viasd_calib.files import atomic_path

INK, MUTED, LINE, PAPER = "#1f2328", "#59636e", "#d0d7de", "#fdfdfc"
TIER_COLOURS = {Tier.ACCEPT: "#0072b2", Tier.REGENERATE: "#e69f00", Tier.ESCALATE: "#9aa4ae"}
GATE_COLOURS = {"draft": "#00795a", "slim": "#a8458f"}
THEME = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
    TIER_COLOURS[Tier.ACCEPT]: "--accept",
    TIER_COLOURS[Tier.REGENERATE]: "--regenerate",
    TIER_COLOURS[Tier.ESCALATE]: "--escalate",
    GATE_COLOURS["draft"]: "--draft-gate",
    GATE_COLOURS["slim"]: "--slim-gate",
}
"""Colours of the light theme, and the CSS variables that stand for them in a page."""

TIER_NAMES = {tier: f"tier {tier.value} {tier.name.lower()}" for tier in Tier}
LATENCY_COLOURS = {"draft": TIER_COLOURS[Tier.ACCEPT], "slim": TIER_COLOURS[Tier.REGENERATE], "full": INK}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it is searchable, and takes the page's typeface
    "svg.hashsalt": "viasd_calib",  # the same picture gives the same bytes
    "hatch.linewidth": 0.7,
}
SMALL, NORMAL = 8.0, 9.0  # points
DASHES = (0, (5, 3))
METHOD_MARKERS = {"autoregressive": "s", "speculative": "^", "three_tier": "o"}
METHOD_COLOURS = {
    "autoregressive": MUTED,
    "speculative": TIER_COLOURS[Tier.REGENERATE],
    "three_tier": TIER_COLOURS[Tier.ACCEPT],
}


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure on light ground, atomically, in the format that its ending names.

    Raises:
        StorageError: the ending names no format, or the place cannot be written.
    """
    kind = picture_format(path)
    with atomic_path(path) as temporary, mpl.rc_context(_STYLE):
        figure.savefig(temporary, format=kind, facecolor=PAPER, dpi=160)


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """A figure as an ``<svg>`` element for a page.

    Args:
        name: unique in the page; put before every id.
        alt: what the picture shows, for those who cannot see it.
    """
    written = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sid="', f' id="{name}-', svg)
    svg = re.sub(r'\s(?:xlink:)?href="#', f' href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in THEME.items():
        svg = re.sub(f"{colour}(?![0-9a-f])", f"var({variable})", svg, flags=re.IGNORECASE)
    width, height = (float(size) * 4 / 3 for size in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib always writes a viewBox"
    head = (
        f'<svg class="picture" role="img" aria-label="{html.escape(alt)}" viewBox="{box[1]}" '
        f'width="{width:.0f}" height="{height:.0f}">'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def method_label(name: str) -> str:
    """A method's name in running text.

    Example:
        >>> method_label("three_tier")
        'three-tier'
    """
    return name.replace("_", "-")


def canvas(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")  # inches


def one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one pair of axes."""
    figure = canvas(width, height)
    axes = figure.subplots()
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """Give axes the style that all plots share."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=LINE, labelcolor=MUTED, labelsize=SMALL)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=NORMAL)


def legend(axes: Axes, **more: Any) -> None:
    """A legend above the right end of ``axes``."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=SMALL, labelcolor=INK,
                borderaxespad=0.2, borderpad=0.2, handletextpad=0.5, columnspacing=1.4, **more)  # fmt: skip


def mark_bound(axes: Axes, bound: float | None) -> None:
    """Draw the certified bound, a share, as a vertical line; nothing where there is none."""
    if bound is not None:
        axes.axvline(100 * bound, color=INK, linewidth=1, linestyle=(0, (5, 3)), label="certified bound")


def percent_axis(axes: Axes) -> None:
    """Label the horizontal axis, which is in percent."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))


def plain(text: str) -> str:
    """A label in which a dollar sign begins no formula."""
    return text.replace("$", r"\$")  # no formula
