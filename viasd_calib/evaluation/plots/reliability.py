"""How well the gates' scores are calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from viasd_calib.evaluation.plots.style import GATE_COLOURS, MUTED, canvas, dress, legend

if TYPE_CHECKING:
    from viasd_calib.calibration.reliability import Reliability


def reliability_diagram(gates: Mapping[str, Reliability]) -> Figure:
    """Reliability of the gates on held-back texts: agreement by score, above how many candidates there were.

    Args:
        gates: by ``draft`` and ``slim``; at least one.
    """
    figure = canvas(4.9, 4.7)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for panel in (axes, below):
        dress(panel)
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
    legend(axes, alignment="right")
    return figure
