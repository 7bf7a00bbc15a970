"""The gates' calibration errors in rows of words, for the command line and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from viasd_calib.evaluation.method_columns import NOTHING

if TYPE_CHECKING:
    from viasd_calib.calibration.reliability import GroupError, Reliability

GATE_HEADINGS = ("gate", "error", "95 % interval", "by chance", "candidates", "prompts")


def gate_rows(gates: Mapping[str, Reliability]) -> list[tuple[str, ...]]:
    """Rows under ``GATE_HEADINGS``: each gate over all, by task, and by place in the block.

    Gates of earlier releases, which were assessed over all candidates alone, have one row.

    Example:
        >>> from viasd_calib.calibration.reliability import Reliability
        >>> found = Reliability(expected_calibration_error=0.01, auroc=0.8, confidence=[0.5], accuracy=[0.5], count=[9])
        >>> gate_rows({"draft": found})
        [('draft', '0.0100', '–', '–', '9', '–')]
    """
    return [row for name, gate in gates.items() for row in _rows_of(name, gate)]


def _rows_of(name: str, gate: Reliability) -> Iterator[tuple[str, ...]]:
    if gate.overall is None:
        error = f"{gate.expected_calibration_error:.4f}"
        yield name, error, NOTHING, NOTHING, f"{sum(gate.count):,}", NOTHING
        return
    yield _row(name, gate.overall)
    for task, found in gate.by_task.items():
        yield _row(f"  {task}", found)
    for place, found in gate.by_place.items():
        yield _row(f"  place {place}", found)


def _row(words: str, found: GroupError) -> tuple[str, ...]:
    interval = NOTHING if found.low is None else f"{found.low:.3f}–{found.high:.3f}"
    error, chance = f"{found.expected_calibration_error:.4f}", f"{found.by_chance:.4f}"
    return words, error, interval, chance, f"{found.candidates:,}", f"{found.prompts:,}"
