"""``viasd plan``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.notices import say_written
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline import plan as job
from viasd_calib.pipeline.options import PlanOptions
from viasd_calib.spec import PlanEntry
from viasd_calib.tables import new_table


def plan(options: PlanOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Plan, and print what was predicted and decoded, the plan, and why it is so."""
    result = job.plan(options, load)
    console = Console()
    console.print(predictions_table(result))
    if result.spec.plan is not None:
        console.print(plan_table(result.spec.plan))
    for line in result.words:
        console.print(line)
    say_written(options.out)


def predictions_table(result: job.PlanResult) -> Table:
    """The fastest policy of each kind at each batch and context."""
    table = new_table(
        "the fastest policy of each kind, by a replay of traces (simulated)",
        ["batch", "context", "", "ms/token", "speed-up", "decoded", "passes", "policy"],
        caption="speed-up: over no drafting; decoded: the same, measured on prompts about as long; "
        "passes: full / slim / draft, a token; batch: texts that go in lockstep, each with its share of the time",
    )
    for batch, predictions in result.predictions.items():
        for found in predictions:
            shown = result.decoded[batch].get(found.costs.context)
            measured = {} if shown is None else shown.measured
            for kind, one in found.by_kind.items():
                seen = measured.get(kind)
                table.add_row(
                    str(batch), str(found.costs.context), kind, f"{1000 * one.seconds:.2f}",
                    f"{found.speedup(one):.2f}", "" if seen is None else f"{measured['no drafting'] / seen:.2f}",
                    f"{one.full:.2f} / {one.slim:.2f} / {one.draft:.2f}", one.policy.words,
                )  # fmt: skip
    return table


def plan_table(rows: list[PlanEntry]) -> Table:
    """The plan as the spec has it."""
    table = new_table(
        "the plan", ["up to batch", "up to context", "drafter", "draft length", "stop", "slim from", "pending"]
    )
    for row in rows:
        one = row.policy
        table.add_row(
            _bound(row.max_batch), _bound(row.max_context), one.drafter or "draft model", str(one.draft_length),
            f"{one.draft_stop_below:g}", f"{one.accept_at:g}" if one.slim_tier else "-", str(one.max_pending),
        )  # fmt: skip
    return table


def _bound(value: int | None) -> str:
    return "any" if value is None else str(value)
