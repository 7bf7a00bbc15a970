"""What passes and decoded tokens take, by width and by context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from viasd_calib.evaluation.plots.style import (
    DASHES,
    INK,
    LATENCY_COLOURS,
    METHOD_COLOURS,
    METHOD_MARKERS,
    NORMAL,
    SMALL,
    canvas,
    dress,
    legend,
    method_label,
    plain,
)

if TYPE_CHECKING:
    from viasd_calib.profiling.profile import LatencyProfile, Measured, RoundTimes


_LATENCY_MARKERS = {"draft": "^", "slim": "o", "full": "s"}


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
    figure = canvas(9.4, 8.0 if profile.rounds else 4.1)
    above: Any = figure
    if profile.rounds:
        above, below = figure.subfigures(2, 1)  # type: ignore[misc]
    by_width, by_context = above.subplots(1, 2, sharey=True)
    for axes in (by_width, by_context):
        dress(axes)
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
        axes.set_title(title, loc="left", color=INK, fontsize=NORMAL)
        axes.set(xlabel=xlabel, xlim=(0, 1.04 * points[-1]), ylim=(0, 1.15 * highest))
        axes.set_xticks([point for place, point in enumerate(points) if _has_room(points, place)])
        legend(axes, ncols=2)
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
        dress(axes)
        contexts = [entry.context for entry in own]
        colour = METHOD_COLOURS.get(name, INK)
        axes.plot(contexts, [1000 * entry.total for entry in own], color=colour, linewidth=1.8,
                  marker=METHOD_MARKERS.get(name, "D"), markersize=5, label="measured")  # fmt: skip
        axes.plot(contexts, [1000 * seconds for seconds in _with_attention_alone(own)], color=colour, linewidth=1,
                  linestyle=DASHES, label="if attention alone grew")  # fmt: skip
        axes.plot(contexts, [1000 * entry.seconds["rest"] for entry in own], color=INK, linewidth=1, marker=".",
                  label="gates, policy, host")  # fmt: skip
        axes.set(xlabel="context: tokens of a random text", xlim=(0, 1.04 * contexts[-1]), ylim=(0, 1.15 * highest))
        axes.set_xticks([point for place, point in enumerate(contexts) if _has_room(contexts, place, 0.09)])
        axes.set_title(plain(method_label(name)), loc="left", color=INK, fontsize=NORMAL)
        axes.legend(loc="upper left", frameon=False, fontsize=SMALL, labelcolor=INK)
    panels[0].set_ylabel("milliseconds per decoded token")


def _with_attention_alone(own: Sequence[RoundTimes]) -> list[float]:
    """Seconds a token, had nothing but attention grown since the shortest context."""
    return [own[0].total + entry.attention - own[0].attention for entry in own]


def _latency_line(axes: Axes, axis: Literal["width", "context"], entries: Sequence[Measured]) -> None:
    """Medians of one tier, in a band between the quartiles."""
    tier = entries[0].tier
    places = [getattr(entry, axis) for entry in entries]
    low, median, high = ([1000 * getattr(entry, name) for entry in entries] for name in ("low", "seconds", "high"))
    axes.fill_between(places, low, high, color=LATENCY_COLOURS[tier], alpha=0.18, linewidth=0)
    axes.plot(places, median, color=LATENCY_COLOURS[tier], marker=_LATENCY_MARKERS[tier], markersize=5,
              linewidth=1.8, label=f"{tier} {'step' if tier == 'draft' else 'pass'}")  # fmt: skip


def _token_by_token(axes: Axes, entry: Measured, tokens: int) -> None:
    """What one pass or step a token would take; the line leaves the picture where width is nearly free."""
    each = 1000 * entry.seconds / entry.width
    axes.plot([entry.width, tokens], [each * entry.width, each * tokens], color=LATENCY_COLOURS[entry.tier],
              linewidth=1, linestyle=DASHES, label=f"{entry.tier}, token by token", zorder=1)  # fmt: skip


def _straight_on(axes: Axes, entries: Sequence[Measured]) -> None:
    """The line through the first two of entries at rising contexts."""
    first, second = entries[:2]
    contexts = np.array([entry.context for entry in (first, entries[-1])])
    slope = (second.seconds - first.seconds) / np.diff([entry.context for entry in (first, second)])[0]
    axes.plot(contexts, 1000 * (first.seconds + slope * (contexts - contexts[0])), color=LATENCY_COLOURS[first.tier],
              linewidth=1, linestyle=DASHES, label=f"{first.tier}, in a straight line", zorder=1)  # fmt: skip


def _has_room(points: Sequence[int], place: int, least: float = 0.04) -> bool:
    """Whether a tick's label at ``points[place]`` is clear of the next one's by that share of the axis."""
    return place == len(points) - 1 or points[place + 1] - points[place] >= least * points[-1]
