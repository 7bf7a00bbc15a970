"""``viasd capture``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.notices import say_written
from viasd_calib.pipeline import capture as job
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.options import CaptureOptions
from viasd_calib.tables import new_table


def capture(options: CaptureOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Capture, and print how often the draft model's proposals are the verifier's choice."""
    report = job.capture(options, load)
    if options.draft != "none":
        from viasd_calib.traces.agreement import draft_agreement

        Console().print(agreement_table(draft_agreement(report.folder)))
    held = f"{report.texts} texts, {report.tokens} tokens, {report.bytes_per_token:.0f} bytes per token"
    say_written(report.folder, held)


def agreement_table(found: lazy_types.DraftAgreement) -> Table:
    """Share of proposals that are the verifier's choice: one row a task, one column a number of unverified tokens."""
    headings = ["unverified tokens before", *map(str, found.depths)]
    table = new_table("proposals that are the verifier's choice", headings)
    rows: list[tuple[str, str | None]] = [(task, task) for task in found.tasks]
    for name, task in [*rows, ("all", None)]:
        shares = [found.share(task, depth) for depth in found.depths]
        table.add_row(name, *("-" if share is None else f"{share:.3f}" for share in shares))
    return table
