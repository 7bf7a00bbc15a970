"""``viasd report``."""

from __future__ import annotations

from viasd_calib.cli.notices import say_written
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline import report as job
from viasd_calib.pipeline.options import ReportOptions


def report(options: ReportOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Write the page, and say where it is."""
    job.report(options, load)
    say_written(options.out)
