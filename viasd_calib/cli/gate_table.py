"""The gates' calibration as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from viasd_calib.pipeline import lazy_types
from viasd_calib.tables import new_table


def gate_table(gates: Mapping[str, lazy_types.Reliability]) -> Table:
    """Calibration errors overall, by task and by place in the block; one gate at least."""
    from viasd_calib.evaluation.gate_rows import GATE_HEADINGS, gate_rows

    auroc = ", ".join(f"{name} gate {found.auroc:.2f}" for name, found in gates.items())
    table = new_table(
        "calibration error of the gates on prompts they were not fitted on", GATE_HEADINGS, f"AUROC: {auroc}"
    )
    for row in gate_rows(gates):
        table.add_row(*row)
    return table
