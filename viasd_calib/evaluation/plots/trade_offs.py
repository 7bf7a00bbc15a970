"""What is gained against what is lost: speed and passes against divergence, agreement against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.plots.style import (
    INK,
    LINE,
    METHOD_COLOURS,
    METHOD_MARKERS,
    PAPER,
    SMALL,
    TIER_COLOURS,
    legend,
    mark_bound,
    method_label,
    one_panel,
    percent_axis,
    plain,
)

if TYPE_CHECKING:
    from viasd_calib.evaluation.frontier import Frontier
    from viasd_calib.evaluation.metrics import MethodResult


def speed_against_loss(
    methods: Mapping[str, MethodResult], tasks: Sequence[Mapping[str, MethodResult]], bound: float | None
) -> Figure:
    """Tokens per second of each method against its divergence; large marks for all prompts, small ones a task each.

    Args:
        methods: over all prompts.
        tasks: the same methods on the prompts of one task each.
        bound: the certified loss bound, drawn where it is given.
    """
    figure, axes = one_panel(4.9, 3.9)
    shown = [row for group in (methods, *tasks) for row in group.values()]
    for name, row in methods.items():
        look: dict[str, Any] = {"color": METHOD_COLOURS.get(name, INK), "marker": METHOD_MARKERS.get(name, "D")}
        own = [task[name] for task in tasks if name in task]
        axes.plot([100 * one.divergence for one in own], [one.tokens_per_second for one in own],
                  linestyle="none", markersize=4, alpha=0.45, **look)  # fmt: skip
        axes.plot([100 * row.divergence], [row.tokens_per_second], linestyle="none", markersize=9.5,
                  markeredgecolor=PAPER, label=plain(method_label(name)), **look)  # fmt: skip
    widest = max([0.5, *(115 * row.divergence for row in shown), 130 * (bound or 0)])
    mark_bound(axes, bound)
    fastest = max(row.tokens_per_second for row in shown)
    axes.set(xlim=(-0.04 * widest, widest), ylim=(0, 1.12 * fastest), ylabel="tokens per second",
             xlabel="divergence: tokens q would not have chosen")  # fmt: skip
    percent_axis(axes)
    legend(axes, ncols=2)
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
    figure, axes = one_panel(4.9, 3.9)
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
        axes.annotate(str(place), (x, y), xytext=(7, 5), textcoords="offset points", color=INK, fontsize=SMALL)
    widest = max([0.5, *(1.15 * loss for loss in percent), 130 * (bound or 0)])
    mark_bound(axes, bound)
    axes.set(xlim=(-0.04 * widest, widest), ylim=(0, 1.2 * max(full_passes)), xlabel="observed loss",
             ylabel="full-verifier passes per token")  # fmt: skip
    percent_axis(axes)
    legend(axes, ncols=2)
    return figure


def frontier_picture(frontier: Frontier) -> Figure:
    """Agreement of the members of a frontier against their measured cost: on all places, and where q' is confident."""
    figure, axes = one_panel(5.4, 3.9)
    members = sorted(frontier.members, key=lambda member: member.cost)
    looks = [*zip(("o", "^", "s", "D"), (TIER_COLOURS[Tier.ACCEPT], *[TIER_COLOURS[Tier.REGENERATE]] * 3), strict=True)]
    for low in (False, True):  # those in low bits are no points of the others' curve
        shown = [member for member in members if bool(member.low_bits) == low]
        costs = [member.cost for member in shown]
        lines = {"all places": [member.agreement for member in shown]}
        for share in members[0].agreement_confident:
            lines[f"most confident {float(share):.0%}"] = [member.agreement_confident[share] for member in shown]
        line: dict[str, Any] = {"linestyle": "none", "markerfacecolor": PAPER} if low else {"linewidth": 1.4}
        for (label, agreements), (marker, colour) in zip(lines.items(), looks, strict=False):
            axes.plot(costs, [100 * one for one in agreements], marker=marker, color=colour, markersize=5,
                      label=None if low else label, **line)  # fmt: skip
    for member in members:
        name = member.folder.removeprefix("low-bit-") if member.low_bits else f"{member.target_cost:g}"
        axes.annotate(name, (member.cost, 100 * member.agreement), xytext=(4, -11),
                      textcoords="offset points", color=INK, fontsize=SMALL)  # fmt: skip
    hollow = "; hollow: low bits" if any(member.low_bits for member in members) else ""
    axes.set(xlabel=f"measured cost of a slim pass over a full one; numbers: target costs{hollow}",
             ylabel="agreement with q on held-back texts")  # fmt: skip
    axes.margins(0.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g} %"))
    legend(axes, ncols=len(lines))
    return figure
