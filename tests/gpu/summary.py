"""The record on the screen."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from tests.gpu.record import Check, GpuRecord, StepResult
from viasd_calib.tables import new_table


def step_line(step: StepResult) -> str:
    """One line for a step that has ended."""
    counts = f"{step.count('passed')} passed, {step.count('failed')} failed, {step.count('not run')} not run"
    return f"{step.name}: {step.outcome} in {step.seconds:.1f} s ({counts})"


def summary(record: GpuRecord) -> Iterator[Table | str]:
    """A table of all steps, one of the speeds, and a line for each check that failed or did not run."""
    table = new_table(
        f"{record.machine.get('device')}, torch {record.machine.get('torch')}",
        ["", "outcome", "passed", "failed", "not run", "seconds"],
        caption=f"commit {record.commit}, {record.seconds:.0f} s of {record.budget:.0f} s",
    )
    for step in record.steps:
        counts = [str(step.count(outcome)) for outcome in ("passed", "failed", "not run")]
        table.add_row(escape(step.name), step.outcome, *counts, f"{step.seconds:.1f}")
    yield table
    speeds = new_table("tokens/s", ["", "tokens/s", "x autoregressive", "identical"])
    for step in record.steps:
        for check in step.checks:
            for method, row in check.numbers.get("methods", {}).items():
                speeds.add_row(escape(f"{check.name}: {method}"), *_speed_cells(row))
    if speeds.row_count:
        yield speeds
    for step in record.steps:
        if step.reason:
            yield escape(f"{step.name}: {step.outcome}: {step.reason}")
        for check in step.checks:
            if check.outcome != "passed":
                yield escape(_line(check))


def _speed_cells(row: dict[str, float | None]) -> list[str]:
    faster = row["speedup_vs_autoregressive"]
    ratio = "-" if faster is None else f"{faster:.2f}"
    return [f"{row['tokens_per_second']:.1f}", ratio, f"{row['identical_to_autoregressive']:.2f}"]


def _line(check: Check) -> str:
    lines = (check.reason or "").strip().splitlines()
    return f"{check.name}: {check.outcome}: {lines[-1] if lines else ''}"
