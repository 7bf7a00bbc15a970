"""What runs when within one round of decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.plots.style import (
    DASHES,
    GATE_COLOURS,
    INK,
    LATENCY_COLOURS,
    MUTED,
    NORMAL,
    PAPER,
    SMALL,
    TIER_COLOURS,
    canvas,
    dress,
    method_label,
    plain,
)

if TYPE_CHECKING:
    from viasd_calib.profiling.recording import RecordedRound


ROUND_ROWS = ("draft", "slim", "full", "head", "rest")
ROUND_NAMES = {
    "draft": "draft model",
    "slim": "slim pass",
    "full": "full pass",
    "head": "output head",
    "rest": "gates, policy, host",
}
ROUND_COLOURS = {**LATENCY_COLOURS, "head": GATE_COLOURS["slim"], "rest": TIER_COLOURS[Tier.ESCALATE]}


def round_timelines(rounds: Mapping[str, RecordedRound]) -> Figure:
    """What ran when in one round of each method, one below the other on one axis of time.

    Args:
        rounds: by method, at least one; an output head's bar stands in a row of its own, after its pass.
    """
    figure = canvas(9.4, 0.45 + 1.6 * len(rounds))
    panels = figure.subplots(len(rounds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, one) in zip(panels, rounds.items(), strict=True):
        dress(axes)
        axes.grid(visible=False, axis="y")
        bars = {row: [(span.begin, span.end) for span in one.spans if span.tier == row] for row in ROUND_ROWS}
        bars["rest"] = one.gaps()
        for height, row in enumerate(reversed(ROUND_ROWS)):
            _timeline_row(axes, height, row, bars[row], one.seconds)
        axes.axvline(1000 * one.seconds, color=INK, linewidth=1, linestyle=DASHES)
        axes.set_yticks(range(len(ROUND_ROWS)), [ROUND_NAMES[row] for row in reversed(ROUND_ROWS)])
        axes.set(ylim=(-0.6, len(ROUND_ROWS) - 0.4))
        title = f"{plain(method_label(name))}: {1000 * one.seconds:.1f} ms"
        axes.set_title(title, loc="left", color=INK, fontsize=NORMAL)
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
                  textcoords="offset points", va="center", color=MUTED, fontsize=SMALL)  # fmt: skip
