"""The report's pictures, one function each: pure, on figures of their own, no pyplot.

A figure is drawn in the colours of the light theme. ``inline_svg`` turns these colours into the CSS
variables of the page, so that one picture reads well on light and on dark ground. The colours are told
apart by people who are colour-blind, and shape, hatching or position says the same again.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.pictures import picture_format
from viasd_calib.files import atomic_path
from viasd_calib.slim.parts.skips import SkippedRun, skipped_runs

if TYPE_CHECKING:
    from viasd_calib.calibration.logistic_gate import Reliability
    from viasd_calib.evaluation.frontier import Frontier
    from viasd_calib.evaluation.metrics import MethodResult
    from viasd_calib.profiling.profile import LatencyProfile, Measured, RoundTimes
    from viasd_calib.profiling.recording import RecordedRound
    from viasd_calib.spec import Route

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
PLACES_PER_BIN = 8
LATENCY_COLOURS = {"draft": TIER_COLOURS[Tier.ACCEPT], "slim": TIER_COLOURS[Tier.REGENERATE], "full": INK}
ROUND_COLOURS = {**LATENCY_COLOURS, "head": GATE_COLOURS["slim"], "rest": TIER_COLOURS[Tier.ESCALATE]}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it is searchable, and takes the page's typeface
    "svg.hashsalt": "viasd_calib",  # the same picture gives the same bytes
    "hatch.linewidth": 0.7,
}
_SMALL, _NORMAL = 8.0, 9.0  # points
_DASHES = (0, (5, 3))
_LATENCY_MARKERS = {"draft": "^", "slim": "o", "full": "s"}
_METHOD_MARKERS = {"autoregressive": "s", "speculative": "^", "three_tier": "o"}
_METHOD_COLOURS = {
    "autoregressive": MUTED,
    "speculative": TIER_COLOURS[Tier.REGENERATE],
    "three_tier": TIER_COLOURS[Tier.ACCEPT],
}


@dataclass(frozen=True)
class PlacedShares:
    """Tier shares by place in the text.

    Attributes:
        shares: of each bin's tokens, those of each tier, in the order of ``Tier``; [bins, 3], rows add to 1.
        tokens: in each bin, [bins]; they fall where texts end.
    """

    shares: np.ndarray
    tokens: np.ndarray


def shares_by_place(tiers: Sequence[Sequence[Tier]], width: int = PLACES_PER_BIN) -> PlacedShares:
    """Count the tiers of texts in bins of ``width`` places.

    Example:
        >>> placed = shares_by_place([[Tier.ACCEPT] * 3, [Tier.ESCALATE]], width=2)
        >>> placed.shares.tolist(), placed.tokens.tolist()
        ([[0.6666666666666666, 0.0, 0.3333333333333333], [1.0, 0.0, 0.0]], [3, 1])
    """
    bins = -(-max((len(text) for text in tiers), default=0) // width)
    counts = np.zeros((bins, len(Tier)), dtype=np.int64)
    for text in tiers:
        for place, tier in enumerate(text):
            counts[place // width, tier - 1] += 1
    tokens = counts.sum(1)
    return PlacedShares(counts / tokens[:, None], tokens)


def route_map(route: Route, num_layers: int) -> Figure:
    """The route as a layer x sublayer map: filled where q' runs a sublayer, hatched where it skips one.

    Above it lies a bar for each bridge, over the layers of the run that it stands in for.
    """
    bridged = [] if route.bridges is None else skipped_runs(route)
    figure, axes = _figure(9.4, 1.8 if bridged else 1.55)
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
    _legend(axes, handles=handles, ncols=3)
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


def reliability_diagram(gates: Mapping[str, Reliability]) -> Figure:
    """Reliability of the gates on held-back texts: agreement by score, above how many candidates there were.

    Args:
        gates: by ``draft`` and ``slim``; at least one.
    """
    figure = _canvas(4.9, 4.7)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for panel in (axes, below):
        _dress(panel)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)), label="score = agreement")
    for number, (name, gate) in enumerate(gates.items()):
        colour, marker = GATE_COLOURS[name], "os"[number % 2]
        label = f"{name} gate: ECE {gate.expected_calibration_error:.3f}, AUROC {gate.auroc:.2f}"
        axes.plot(gate.confidence, gate.accuracy, color=colour, marker=marker, markersize=4.5,
                  linewidth=1.6, label=label)  # fmt: skip
        width = 0.026
        offset = (number - (len(gates) - 1) / 2) * width
        below.bar(np.array(gate.confidence) + offset, gate.count, width * 0.9, color=colour)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share that was q's choice")
    most = max(count for gate in gates.values() for count in gate.count)
    below.set(yscale="log", ylim=(0.7, 1.6 * most), xlabel="score of the gate", ylabel="candidates")
    below.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    below.yaxis.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.1f}"))
    _legend(axes, alignment="right")
    return figure


def tier_shares(tiers: Sequence[Sequence[Tier]]) -> Figure:
    """Tier shares by place in the text, above the number of tokens they are shares of.

    Args:
        tiers: per text; at least one token in all.
    """
    placed = shares_by_place(tiers)
    places = np.arange(len(placed.tokens)) * PLACES_PER_BIN
    figure = _canvas(6.4, 3.9)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for panel in (axes, below):
        _dress(panel)
    base = np.zeros(len(places))
    for tier in Tier:
        share = 100 * placed.shares[:, tier - 1]
        axes.bar(places, share, PLACES_PER_BIN, bottom=base, align="edge", color=TIER_COLOURS[tier],
                 edgecolor=PAPER, linewidth=0.8, label=TIER_NAMES[tier])  # fmt: skip
        base += share
    below.bar(places, placed.tokens, PLACES_PER_BIN, align="edge", color=MUTED, edgecolor=PAPER, linewidth=0.8)
    axes.set(ylim=(0, 100), xlim=(0, len(places) * PLACES_PER_BIN), ylabel="share of tokens")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0f} %"))
    below.set(ylabel="tokens", xlabel="place in the generated text")
    below.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    below.xaxis.set_major_locator(MultipleLocator(PLACES_PER_BIN * -(-len(places) // 12)))
    _legend(axes, ncols=3)
    return figure


def speed_against_loss(
    methods: Mapping[str, MethodResult], tasks: Sequence[Mapping[str, MethodResult]], bound: float | None
) -> Figure:
    """Tokens per second of each method against its divergence; large marks for all prompts, small ones a task each.

    Args:
        methods: over all prompts.
        tasks: the same methods on the prompts of one task each.
        bound: the certified loss bound, drawn where it is given.
    """
    figure, axes = _figure(4.9, 3.9)
    shown = [row for group in (methods, *tasks) for row in group.values()]
    for name, row in methods.items():
        look: dict[str, Any] = {"color": _METHOD_COLOURS.get(name, INK), "marker": _METHOD_MARKERS.get(name, "D")}
        own = [task[name] for task in tasks if name in task]
        axes.plot([100 * one.divergence for one in own], [one.tokens_per_second for one in own],
                  linestyle="none", markersize=4, alpha=0.45, **look)  # fmt: skip
        axes.plot([100 * row.divergence], [row.tokens_per_second], linestyle="none", markersize=9.5,
                  markeredgecolor=PAPER, label=_plain(method_label(name)), **look)  # fmt: skip
    widest = max([0.5, *(115 * row.divergence for row in shown), 130 * (bound or 0)])
    _mark_bound(axes, bound)
    fastest = max(row.tokens_per_second for row in shown)
    axes.set(xlim=(-0.04 * widest, widest), ylim=(0, 1.12 * fastest), ylabel="tokens per second",
             xlabel="divergence: tokens q would not have chosen")  # fmt: skip
    _percent_axis(axes)
    _legend(axes, ncols=2)
    return figure


def candidates_tested(
    losses: Sequence[float], full_passes: Sequence[float], held: Sequence[bool], bound: float | None
) -> Figure:
    """What each candidate of the certification lost and spent; filled where it was certified.

    Args:
        losses: mean loss over the calibration prompts that were decoded; in the order of testing.
        full_passes: full-verifier passes per token.
        held: whether the candidate was certified.
        bound: the certified loss bound, drawn where it is given.
    """
    figure, axes = _figure(4.9, 3.9)
    percent = [100 * loss for loss in losses]
    axes.plot(percent, full_passes, color=LINE, linewidth=1.2, zorder=1)
    looks = ((True, TIER_COLOURS[Tier.ACCEPT], "o", "certified"), (False, "none", "X", "not certified"))
    for kind, fill, marker, label in looks:
        chosen = [place for place, certified in enumerate(held) if certified is kind]
        edge = TIER_COLOURS[Tier.ACCEPT] if kind else INK
        axes.plot([percent[place] for place in chosen], [full_passes[place] for place in chosen], marker=marker,
                  markersize=8.5, linestyle="none", markerfacecolor=fill, markeredgecolor=edge,
                  label=label if chosen else None)  # fmt: skip
    for place, (x, y) in enumerate(zip(percent, full_passes, strict=True), start=1):
        axes.annotate(str(place), (x, y), xytext=(7, 5), textcoords="offset points", color=INK, fontsize=_SMALL)
    widest = max([0.5, *(1.15 * loss for loss in percent), 130 * (bound or 0)])
    _mark_bound(axes, bound)
    axes.set(xlim=(-0.04 * widest, widest), ylim=(0, 1.2 * max(full_passes)), xlabel="observed loss",
             ylabel="full-verifier passes per token")  # fmt: skip
    _percent_axis(axes)
    _legend(axes, ncols=2)
    return figure


def frontier_picture(frontier: Frontier) -> Figure:
    """Agreement of the members of a frontier against their measured cost: on all places, and where q' is confident."""
    figure, axes = _figure(5.4, 3.9)
    members = sorted(frontier.members, key=lambda member: member.cost)
    costs = [member.cost for member in members]
    looks = zip(("o", "^", "s", "D"), (TIER_COLOURS[Tier.ACCEPT], *[TIER_COLOURS[Tier.REGENERATE]] * 3), strict=True)
    lines = {"all places": [member.agreement for member in members]}
    for share in members[0].agreement_confident:
        lines[f"most confident {float(share):.0%}"] = [member.agreement_confident[share] for member in members]
    for (label, agreements), (marker, colour) in zip(lines.items(), looks, strict=False):
        axes.plot(costs, [100 * one for one in agreements], marker=marker, color=colour, markersize=5,
                  linewidth=1.4, label=label)  # fmt: skip
    for member in members:
        axes.annotate(f"{member.target_cost:g}", (member.cost, 100 * member.agreement), xytext=(4, -11),
                      textcoords="offset points", color=INK, fontsize=_SMALL)  # fmt: skip
    axes.set(xlabel="measured cost of a slim pass over a full one; numbers: target costs",
             ylabel="agreement with q on held-back texts")  # fmt: skip
    axes.margins(0.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g} %"))
    _legend(axes, ncols=len(lines))
    return figure


def latency_profile(profile: LatencyProfile) -> Figure:
    """What passes take: by width at the shortest context, and at the smallest width by context; smallest batch.

    The dashed lines on the left are as many passes, or draft steps, as tokens: the further a full pass stays
    below its own, the freer width is. The one on the right goes straight on from the two shortest contexts:
    attention reads each cached token once, so its own growth keeps to a straight line.

    Below, one panel a method: what a decoded token takes by context, what it would take if nothing but
    scaled dot-product attention grew, and gates, policy and host.
    """
    settings = profile.settings
    context, width, batch = settings.contexts[0], settings.widths[0], settings.batches[0]
    figure = _canvas(9.4, 8.0 if profile.rounds else 4.1)
    above: Any = figure
    if profile.rounds:
        above, below = figure.subfigures(2, 1)  # type: ignore[misc]
    by_width, by_context = above.subplots(1, 2, sharey=True)
    for axes in (by_width, by_context):
        _dress(axes)
    wider: dict[str, list[Measured]] = {}
    longer: dict[str, list[Measured]] = {}
    for tier in ("full", "slim", "draft"):
        smallest = settings.axes(tier)
        own = [entry for entry in profile.measured if entry.tier == tier and entry.batch == smallest.batch[0]]
        wider[tier] = [entry for entry in own if entry.context == context]
        longer[tier] = [entry for entry in own if entry.width == smallest.width[0]]
        _latency_line(by_width, "width", wider[tier])
        _latency_line(by_context, "context", longer[tier])
    for tier in ("full", "draft"):
        _token_by_token(by_width, wider[tier][0], settings.widths[-1])
    if len(longer["full"]) > 2:
        _straight_on(by_context, longer["full"])
    highest = max(1000 * entry.high for lines in (wider, longer) for line in lines.values() for entry in line)
    texts = "one text" if batch == 1 else f"{batch} texts (drafted: one)"
    for axes, title, xlabel, points in (
        (by_width, f"context {context}, {texts}", "width: new tokens of a pass", settings.widths),
        (by_context, f"width {width}, {texts}", "context: cached tokens", settings.contexts),
    ):
        axes.set_title(title, loc="left", color=INK, fontsize=_NORMAL)
        axes.set(xlabel=xlabel, xlim=(0, 1.04 * points[-1]), ylim=(0, 1.15 * highest))
        axes.set_xticks([point for place, point in enumerate(points) if _has_room(points, place)])
        _legend(axes, ncols=2)
    by_width.set_ylabel("milliseconds")
    if profile.rounds:
        _by_method(below, profile.rounds)
    return figure


def _by_method(figure: SubFigure, rounds: Sequence[RoundTimes]) -> None:
    """Time of a decoded token by context, a panel for each method."""
    methods: dict[str, list[RoundTimes]] = {}
    for entry in rounds:
        methods.setdefault(entry.method, []).append(entry)
    highest = max(1000 * max(entry.total, _with_attention_alone(own)[-1]) for own in methods.values() for entry in own)
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, (name, own) in zip(panels, methods.items(), strict=True):
        _dress(axes)
        contexts = [entry.context for entry in own]
        colour = _METHOD_COLOURS.get(name, INK)
        axes.plot(contexts, [1000 * entry.total for entry in own], color=colour, linewidth=1.8,
                  marker=_METHOD_MARKERS.get(name, "D"), markersize=5, label="measured")  # fmt: skip
        axes.plot(contexts, [1000 * seconds for seconds in _with_attention_alone(own)], color=colour, linewidth=1,
                  linestyle=_DASHES, label="if attention alone grew")  # fmt: skip
        axes.plot(contexts, [1000 * entry.seconds["rest"] for entry in own], color=INK, linewidth=1, marker=".",
                  label="gates, policy, host")  # fmt: skip
        axes.set(xlabel="context: tokens of a random text", xlim=(0, 1.04 * contexts[-1]), ylim=(0, 1.15 * highest))
        axes.set_xticks([point for place, point in enumerate(contexts) if _has_room(contexts, place, 0.09)])
        axes.set_title(_plain(method_label(name)), loc="left", color=INK, fontsize=_NORMAL)
        axes.legend(loc="upper left", frameon=False, fontsize=_SMALL, labelcolor=INK)
    panels[0].set_ylabel("milliseconds per decoded token")


def _with_attention_alone(own: Sequence[RoundTimes]) -> list[float]:
    """Seconds a token, had nothing but attention grown since the shortest context."""
    return [own[0].total + entry.attention - own[0].attention for entry in own]


def _latency_line(axes: Axes, along: Literal["width", "context"], entries: Sequence[Measured]) -> None:
    """Medians of one tier, in a band between the quartiles."""
    tier = entries[0].tier
    places = [getattr(entry, along) for entry in entries]
    low, median, high = ([1000 * getattr(entry, name) for entry in entries] for name in ("low", "seconds", "high"))
    axes.fill_between(places, low, high, color=LATENCY_COLOURS[tier], alpha=0.18, linewidth=0)
    axes.plot(places, median, color=LATENCY_COLOURS[tier], marker=_LATENCY_MARKERS[tier], markersize=5,
              linewidth=1.8, label=f"{tier} {'step' if tier == 'draft' else 'pass'}")  # fmt: skip


def _token_by_token(axes: Axes, entry: Measured, tokens: int) -> None:
    """What one pass or step a token would take; the line leaves the picture where width is nearly free."""
    each = 1000 * entry.seconds / entry.width
    axes.plot([entry.width, tokens], [each * entry.width, each * tokens], color=LATENCY_COLOURS[entry.tier],
              linewidth=1, linestyle=_DASHES, label=f"{entry.tier}, token by token", zorder=1)  # fmt: skip


def _straight_on(axes: Axes, entries: Sequence[Measured]) -> None:
    """The line through the first two of entries at rising contexts."""
    first, second = entries[:2]
    contexts = np.array([entry.context for entry in (first, entries[-1])])
    slope = (second.seconds - first.seconds) / np.diff([entry.context for entry in (first, second)])[0]
    axes.plot(contexts, 1000 * (first.seconds + slope * (contexts - contexts[0])), color=LATENCY_COLOURS[first.tier],
              linewidth=1, linestyle=_DASHES, label=f"{first.tier}, in a straight line", zorder=1)  # fmt: skip


def _has_room(points: Sequence[int], place: int, least: float = 0.04) -> bool:
    """Whether a tick's label at ``points[place]`` stands clear of the next one's by that share of the axis."""
    return place == len(points) - 1 or points[place + 1] - points[place] >= least * points[-1]


ROUND_ROWS = ("draft", "slim", "full", "head", "rest")
ROUND_NAMES = {
    "draft": "draft model",
    "slim": "slim pass",
    "full": "full pass",
    "head": "output head",
    "rest": "gates, policy, host",
}


def round_timelines(rounds: Mapping[str, RecordedRound]) -> Figure:
    """What ran when in one round of each method, one below the other on one axis of time.

    Args:
        rounds: by method, at least one; an output head's bar stands in a row of its own, after its pass.
    """
    figure = _canvas(9.4, 0.45 + 1.6 * len(rounds))
    panels = figure.subplots(len(rounds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, one) in zip(panels, rounds.items(), strict=True):
        _dress(axes)
        axes.grid(visible=False, axis="y")
        bars = {row: [(span.begin, span.end) for span in one.spans if span.tier == row] for row in ROUND_ROWS}
        bars["rest"] = one.gaps()
        for height, row in enumerate(reversed(ROUND_ROWS)):
            _timeline_row(axes, height, row, bars[row], one.seconds)
        axes.axvline(1000 * one.seconds, color=INK, linewidth=1, linestyle=_DASHES)
        axes.set_yticks(range(len(ROUND_ROWS)), [ROUND_NAMES[row] for row in reversed(ROUND_ROWS)])
        axes.set(ylim=(-0.6, len(ROUND_ROWS) - 0.4))
        title = f"{_plain(method_label(name))}: {1000 * one.seconds:.1f} ms"
        axes.set_title(title, loc="left", color=INK, fontsize=_NORMAL)
    longest = max(one.seconds for one in rounds.values())
    panels[-1].set(xlabel="milliseconds since the round began", xlim=(0, 1080 * longest))
    return figure


def _timeline_row(axes: Axes, height: int, row: str, bars: Sequence[tuple[float, float]], end: float) -> None:
    """The bars of one row, with what they add up to after the round's end."""
    if not bars:
        return
    spans = [(1000 * begin, 1000 * (end - begin)) for begin, end in bars]
    axes.broken_barh(spans, (height - 0.36, 0.72), facecolor=ROUND_COLOURS[row], edgecolor=PAPER, linewidth=0.4)
    axes.annotate(f"{sum(length for _, length in spans):.1f} ms", (1000 * end, height), xytext=(5, 0),
                  textcoords="offset points", va="center", color=MUTED, fontsize=_SMALL)  # fmt: skip


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure on light ground, atomically, in the format that its ending names.

    Raises:
        StorageError: the ending names no format, or the place cannot be written.
    """
    kind = picture_format(path)
    with atomic_path(path) as temporary, mpl.rc_context(_STYLE):
        figure.savefig(temporary, format=kind, facecolor=PAPER, dpi=160)


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """A figure as an ``<svg>`` element to stand inside a page.

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


def _canvas(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")  # inches


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _canvas(width, height)
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=LINE, labelcolor=MUTED, labelsize=_SMALL)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=_NORMAL)


def _legend(axes: Axes, **more: Any) -> None:
    """A legend above the right end of ``axes``."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=_SMALL, labelcolor=INK,
                borderaxespad=0.2, borderpad=0.2, handletextpad=0.5, columnspacing=1.4, **more)  # fmt: skip


def _mark_bound(axes: Axes, bound: float | None) -> None:
    if bound is not None:
        axes.axvline(100 * bound, color=INK, linewidth=1, linestyle=(0, (5, 3)), label="certified bound")


def _percent_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # no formula
