"""``viasd monitor``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.notices import say_written
from viasd_calib.cli.parser import HelpFormatter, OptionsParser
from viasd_calib.errors import CalibrationError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline import monitor as job
from viasd_calib.pipeline.options import MonitorOptions
from viasd_calib.tables import new_table

LEFT_OUT = {
    "strict": "decoded exactly",
    "repeated": "prompts that came before",
    "made_from": "prompts that the spec was made from",
    "other_policy": "of other specs",
}
"""Why texts are left out, in words."""


def monitor(words: Sequence[str]) -> None:
    """Test the bound, and print what was found.

    Raises:
        CalibrationError: the bound is exceeded; so the exit status is 1.
    """
    options = read_options(words)
    found = job.monitor(options)
    Console(highlight=False).print(monitor_table(found))
    if options.json is not None:
        say_written(options.json)
    if found.exceeded_at is not None:
        at = found.exceeded_at
        raise CalibrationError(
            f"the certified bound of {found.bound:g} on {found.loss} is exceeded since text {at.text} ({at.where}); "
            "calibrate anew on prompts like these, or decode with audit strict"
        )


def read_options(words: Sequence[str]) -> MonitorOptions:
    """Read the words of the command: files without a name, and options."""
    summary, _, _ = (MonitorOptions.__doc__ or "").partition("\n\n")
    parser = OptionsParser(prog="viasd monitor", description=summary, formatter_class=HelpFormatter)
    parser.add_argument("--config", action="config", help="Path to a configuration file.")
    parser.add_argument("files", nargs="*", type=str, help="logs, in the order in which their texts were decoded")
    parser.add_class_arguments(MonitorOptions, skip={"files"})
    read = parser.parse_args(words)
    return MonitorOptions(
        files=read.files, spec=read.spec, level=read.level, json=read.json, skip_others=read.skip_others
    )


def monitor_table(found: lazy_types.MonitorReport) -> Table:
    """What was found, as a table."""
    table = new_table(f"{found.loss} of texts, certified at most {found.bound:g}", ["", ""])
    table.add_row("texts", str(found.n_texts))
    table.add_row("mean loss", "-" if found.mean_loss is None else f"{found.mean_loss:.4g}")
    table.add_row("e-value, last", f"{found.e_value:.3g}")
    table.add_row("e-value, largest", f"{found.largest_e_value:.3g}")
    table.add_row("p-value", f"{found.p_value:.3g}")
    for why, count in found.left_out.items():
        table.add_row(f"left out: {LEFT_OUT[why]}", str(count))
    if found.unfinished:
        table.add_row("left out: unfinished lines", str(len(found.unfinished)))
    at = found.exceeded_at
    answer = "holds so far" if at is None else f"exceeded since text {at.text}"
    table.add_row(f"answer at level {found.level:g}", answer)
    return table
