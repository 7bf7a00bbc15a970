"""``viasd profile``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from viasd_calib.cli.notices import say_written
from viasd_calib.pipeline import profile as job
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.options import ProfileOptions
from viasd_calib.profiling.noise import noise_words
from viasd_calib.profiling.profile import LatencyProfile, Measured, RoundPart
from viasd_calib.tables import new_table


def profile(options: ProfileOptions) -> None:
    """Measure, and print the tables."""
    result = job.profile(options)
    console = Console()
    console.print(profile_table(result))
    console.print(rounds_table(result))
    words = noise_words(result.disturbed or 0.0)
    if words is not None:
        notice(words)
    say_written(options.json)
    if options.plot is not None:
        say_written(options.plot)


def profile_table(profile: LatencyProfile) -> Table:
    """A profile as a table: one row a tier, batch and context, one column a width."""
    table = new_table(
        "milliseconds by width: median, below it the quartiles' distance in %",
        ["", "batch", "context", *map(str, profile.settings.widths)],
        caption=f"{profile.dtype}, {profile.hardware['device']}",
    )
    rows: dict[tuple[str, int, int | None], dict[int, Measured]] = {}
    for entry in profile.measured:
        rows.setdefault((entry.tier, entry.batch, entry.context), {})[entry.width] = entry
    for (tier, batch, context), by_width in rows.items():
        cells = [_cell(by_width.get(width)) for width in profile.settings.widths]
        table.add_row(tier, str(batch), "-" if context is None else str(context), *cells)
    return table


def rounds_table(profile: LatencyProfile) -> Table:
    """What decoded tokens took: one row a method and context, one column for what their time went to."""
    parts: tuple[RoundPart, ...] = ("draft", "slim", "full", "head", "rest")
    table = new_table(
        "milliseconds per decoded token, by context of random tokens",
        ["", "context", "all", *parts, "%", "attention"],
        caption="rest: gates, policy and host, after it in % of all; attention: takes that much alone",
    )
    for entry in profile.rounds:
        own = [milliseconds(entry.seconds[part]) if part in entry.seconds else "-" for part in parts]
        attention = milliseconds(entry.attention)
        rest = f"{100 * entry.rest_share:.1f}"
        table.add_row(entry.method, str(entry.context), milliseconds(entry.total), *own, rest, attention)
    return table


def _cell(entry: Measured | None) -> str:
    if entry is None:
        return "-"
    below, above = (100 * (quartile / entry.seconds - 1) for quartile in (entry.low, entry.high))
    return f"{milliseconds(entry.seconds)}\n[dim]{below:+.0f} {above:+.0f}[/]"


def milliseconds(seconds: float) -> str:
    """Three figures, or all before the point.

    Example:
        >>> milliseconds(0.0361234), milliseconds(1.23456)
        ('36.1', '1235')
    """
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
