"""Where a slim verifier may pay: what its pass costs against how many full passes still follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.plots.style import DASHES, INK, PAPER, SMALL, TIER_COLOURS, one_panel

if TYPE_CHECKING:
    from viasd_calib.evaluation.break_even import BreakEven


def break_even_picture(found: BreakEven) -> Figure:
    """Cost of a slim pass over a full one against full passes a slim pass, with the line where both sum to 1.

    A mark for each width that the cost was measured at, with the width beside it; under the line, in the shaded part,
    q' costs less than the full passes that it saves.
    """
    figure, axes = one_panel(4.9, 4.4)
    costs = sorted(found.costs.items())
    blue = TIER_COLOURS[Tier.ACCEPT]
    axes.fill_between([0, 1], [1, 0], color=blue, alpha=0.12, linewidth=0, label="costs less than it saves")
    axes.plot([0, 1], [1, 0], color=INK, linewidth=1, linestyle=DASHES, label="break-even")
    axes.plot([cost for _, cost in costs], [found.escalated] * len(costs), "o-", color=blue, markersize=7,
              linewidth=1, markeredgecolor=PAPER, label="this spec, by width (tokens)")  # fmt: skip
    for width, cost in costs:
        axes.annotate(f"{width}", (cost, found.escalated), xytext=(0, 6), textcoords="offset points", ha="center",
                      color=INK, fontsize=SMALL)  # fmt: skip
    axes.set(xlim=(0, 1.1 * max([1.0, *found.costs.values()])), ylim=(0, 1.1 * max(1.0, found.escalated)),
             xlabel="cost of a slim pass over that of a full one (measured)",
             ylabel="full passes a slim pass (decoded)")  # fmt: skip
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=SMALL, labelcolor=INK,
                  handletextpad=0.5, columnspacing=1.4)  # fmt: skip
    return figure
