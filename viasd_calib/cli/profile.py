"""``viasd profile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from viasd_calib.choices import Backend
from viasd_calib.cli.notices import say_written
from viasd_calib.devices import check_device
from viasd_calib.errors import PlanningError
from viasd_calib.evaluation.pictures import picture_format
from viasd_calib.pipeline.checks import check_out_file, check_spec
from viasd_calib.profiling.profile import LatencyProfile, Measured, ProfileSettings, RoundPart, save_profile
from viasd_calib.spec import DType
from viasd_calib.tables import new_table


def profile(
    spec: str,
    json: str,
    widths: Sequence[int] = (1, 2, 4, 8, 16),
    contexts: Sequence[int] = (128, 512, 2048),
    batches: Sequence[int] = (1, 4),
    repeats: int = 15,
    plot: str | None = None,
    verifier: str | None = None,
    draft_model: str | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
) -> LatencyProfile:
    """Measure what draft steps, slim and full passes, the output head and decoded tokens take on this machine.

    Args:
        spec: path of the routing spec.
        json: where the profile is written.
        widths: new tokens of a pass.
        contexts: cached tokens before them; also the lengths of the random texts that decoding is timed after.
        batches: texts at once; draft steps are of one text.
        repeats: timed rounds over everything, from which median and quartiles are taken.
        plot: draw a picture of the profile here (.png, .svg or .pdf).
        verifier: where to find the verifier, in place of the name in the spec.
        draft_model: the same for the draft model, where the spec names one.
        dtype: number format, in place of the spec's.
        device: where models run.
        backend: what runs them: eager, packed (CPU) or compiled (minutes to compile first); the faster one of the
            first two where it is left out.
    """
    settings = profile_settings(widths, contexts, batches, repeats)
    check_out_file("--json", json)
    check_device(device)
    if plot is not None:
        check_out_file("--plot", plot)
        picture_format(Path(plot))
    spec, read = check_spec(spec, verifier, draft_model)

    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.profiling.measure import measure_profile

    engine = load_engine(
        spec,
        spec=read,
        verifier=verifier,
        draft_model=draft_model,
        dtype=dtype,
        device=device,
        backend=backend,
    )
    result = measure_profile(engine, settings)
    save_profile(result, json)
    console = Console()
    console.print(profile_table(result))
    console.print(rounds_table(result))
    say_written(json)
    if plot is not None:
        from viasd_calib.evaluation.plots import latency_profile, write_figure

        write_figure(latency_profile(result), Path(plot))
        say_written(plot)
    return result


def profile_settings(
    widths: Sequence[int], contexts: Sequence[int], batches: Sequence[int], repeats: int
) -> ProfileSettings:
    """Settings from options.

    Raises:
        PlanningError: naming the first option that makes no sense.
    """
    for name, values in {"widths": widths, "contexts": contexts, "batches": batches}.items():
        if not values or min(values) < 1:
            raise PlanningError(f"--{name} is {[*values]}; give a list, '[..., ...]', each a whole number, at least 1")
    if repeats < 2:  # one has no quartiles
        raise PlanningError(f"--repeats is {repeats}; give a whole number, at least 2")
    return ProfileSettings(widths=tuple(widths), contexts=tuple(contexts), batches=tuple(batches), repeats=repeats)


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
