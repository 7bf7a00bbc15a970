"""How good the replay's predictions are: speed-ups that it predicted against those that were decoded."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from viasd_calib.calibration.policy_timing import CLOSE, SpeedUp
from viasd_calib.decoding.policies import PolicyKind
from viasd_calib.evaluation.plots.style import (
    GATE_COLOURS,
    INK,
    LINE,
    METHOD_COLOURS,
    METHOD_MARKERS,
    MUTED,
    PAPER,
    SMALL,
    one_panel,
)

LOOKS: dict[PolicyKind, tuple[str, str]] = {
    "no drafting": (METHOD_MARKERS["autoregressive"], METHOD_COLOURS["autoregressive"]),
    "speculative": (METHOD_MARKERS["speculative"], METHOD_COLOURS["speculative"]),
    "lookup alone": ("v", GATE_COLOURS["draft"]),
    "three tiers": (METHOD_MARKERS["three_tier"], METHOD_COLOURS["three_tier"]),
    "three tiers without a draft model": ("D", GATE_COLOURS["slim"]),
}
"""Marker and colour by kind."""


def predicted_against_decoded(speedups: Sequence[SpeedUp]) -> Figure:
    """Speed-up over no drafting, predicted by a replay (*simulated*) against decoded, a mark for each policy.

    Marks on the diagonal are as predicted, those in the band within ``CLOSE`` of what was decoded; under it the replay
    promised too much. No drafting, which all are held against, is the open mark at 1.

    Args:
        speedups: one at least.
    """
    figure, axes = one_panel(4.9, 4.9)
    values = [1.0, *(value for one in speedups for value in (one.predicted, one.measured))]
    room = 0.06 * max(max(values) - min(values), 0.5)
    low, high = max(min(values) - room, 0.0), max(values) + room
    ends = [low, high]
    axes.fill_between(ends, [end / (1 + CLOSE) for end in ends], [end / (1 - CLOSE) for end in ends], color=LINE,
                      alpha=0.45, linewidth=0, label=f"within {100 * CLOSE:g} % of decoded")  # fmt: skip
    axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), label="as predicted")
    marker, colour = LOOKS["no drafting"]
    axes.plot([1], [1], marker, color=colour, markersize=7, markerfacecolor=PAPER, label="no drafting")
    for kind, (marker, colour) in LOOKS.items():
        own = [one for one in speedups if one.policy.kind == kind]
        if own:
            axes.plot([one.predicted for one in own], [one.measured for one in own], marker, color=colour,
                      markersize=7.5, markeredgecolor=PAPER, label=kind)  # fmt: skip
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal",
             xlabel="predicted speed-up over no drafting (simulated)",
             ylabel="decoded speed-up over no drafting")  # fmt: skip
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=SMALL, labelcolor=INK,
                  handletextpad=0.5, columnspacing=1.4)  # fmt: skip
    return figure
