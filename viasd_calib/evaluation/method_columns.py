"""The table of a benchmark's methods, defined once: the terminal prints some of the columns that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.table import Table

from viasd_calib.calibration.paired import FEWEST_PROMPTS, Interval
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.evaluation.bench import BenchResult
from viasd_calib.evaluation.metrics import MethodResult
from viasd_calib.tables import new_table

NOTHING = "–"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent.

    Example:
        >>> percent(0.0123, 2), percent(None)
        ('1.23\\xa0%', '–')
    """
    return NOTHING if share is None else f"{100 * share:.{digits}f}\xa0%"


def ratio(interval: Interval | None) -> str:
    """A speedup with its interval.

    Example:
        >>> (
        ...     ratio(Interval(median=1.5, low=1.25, high=1.75, n=40)),
        ...     ratio(Interval(median=1.5, low=None, high=None, n=1)),
        ... )
        ('1.50× [1.25,\\xa01.75]', '1.50× [–]')
    """
    if interval is None:
        return NOTHING
    bounds = NOTHING if interval.bounds is None else "{:.2f},\xa0{:.2f}".format(*interval.bounds)
    return f"{interval.median:.2f}× [{bounds}]"


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point.

    Example:
        >>> decimal(0.125), decimal(None)
        ('0.12', '–')
    """
    return NOTHING if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """What is shown of every method.

    Attributes:
        heading: in a report.
        short: the heading in a terminal; empty for what is not printed there.
        meaning: of the numbers, in one sentence.
        cell: the text for one method.
    """

    heading: str
    short: str
    meaning: str
    cell: Callable[[MethodResult], str]


def _shares(row: MethodResult) -> str:
    return "\xa0/\xa0".join(f"{100 * row.tier_shares[tier.name.lower()]:.0f}" for tier in Tier)


COLUMNS = (
    Column(
        "tokens/s",
        "tokens/s",
        "emitted tokens per second of decoding, measured",
        lambda row: f"{row.tokens_per_second:.1f}",
    ),
    Column(
        "vs autoregressive",
        "x autoregressive",
        "tokens per second over those of autoregressive decoding: median and 95 % bootstrap interval over prompts",
        lambda row: ratio(row.speedup_vs_autoregressive),
    ),
    Column(
        "vs speculative",
        "x speculative",
        "the same over plain speculative decoding with the same draft model",
        lambda row: ratio(row.speedup_vs_speculative),
    ),
    Column(
        "decode only, vs speculative",
        "decode x spec.",
        "the same without the time of the prompts' own passes, which all methods share",
        lambda row: ratio(row.decode_speedup_vs_speculative),
    ),
    Column(
        "identical",
        "identical",
        "share of texts that equal the autoregressive text token by token",
        lambda row: percent(row.identical_to_autoregressive, 0),
    ),
    Column(
        "divergence",
        "divergence",
        "share of emitted tokens that the full verifier would not have chosen",
        lambda row: percent(row.divergence, 2),
    ),
    Column(
        "rejection rate",
        "rejection rate",
        "share of compared drafted tokens that were not kept; read it beside full passes per token",
        lambda row: percent(row.rejection_rate),
    ),
    Column(
        "full per token",
        "full/token",
        "full-verifier passes per token",
        lambda row: decimal(row.full_passes_per_token),
    ),
    Column(
        "slim per token",
        "slim/token",
        "slim-verifier passes per token",
        lambda row: decimal(row.slim_passes_per_token),
    ),
    Column(
        "draft per token",
        "draft/token",
        "draft-model steps per token",
        lambda row: decimal(row.draft_steps_per_token),
    ),
    Column(
        "acceptance length",
        "",
        "tokens emitted per full-verifier pass, bonus token included",
        lambda row: decimal(row.acceptance_length),
    ),
    Column(
        "tiers 1\xa0/\xa02\xa0/\xa03, %",
        "tiers 1/2/3 %",
        "share of tokens that were accepted, regenerated and escalated",
        _shares,
    ),
    Column("tokens", "", "emitted tokens", lambda row: f"{row.tokens:,}"),
)


def bench_table(result: BenchResult) -> Table:
    """The benchmark for a terminal: one column a method, and a group of rows for each batch size, if there were any."""
    if result.by_batch:
        return _batches_table(result)
    return _single_texts(_title(result, _prompts(result.n_prompts)), result.n_prompts, result.methods)


def group_tables(result: BenchResult) -> list[Table]:
    """The same of each task, and of each length of prompts, where there are several."""
    return [
        _single_texts(f"{name}, {_prompts(group.n_prompts)}", group.n_prompts, group.methods)
        for name, group in result.groups.items()
    ]


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


def _single_texts(title: str, count: int, methods: Mapping[str, MethodResult]) -> Table:
    table = new_table(title, ["", *methods])
    if count < FEWEST_PROMPTS:
        table.caption = (
            f"{_prompts(count)}: an interval takes {FEWEST_PROMPTS} at least, so no method is shown to be faster"
        )
    _add_rows(table, methods)
    return table


def _title(result: BenchResult, of: str) -> str:
    return f"{of}, {result.settings.max_new_tokens} new tokens, {result.settings.dtype}"


def _add_rows(table: Table, methods: Mapping[str, MethodResult]) -> None:
    for column in COLUMNS:
        if column.short:
            table.add_row(column.short, *(column.cell(row) for row in methods.values()))


def _batches_table(result: BenchResult) -> Table:
    groups = {f"batch {size}": (found.methods, len(found.texts)) for size, found in result.by_batch.items()}
    if result.methods:
        groups = {"batch 1": (result.methods, result.n_prompts), **groups}
    table = new_table(_title(result, f"{result.n_prompts} prompts"), ["", *result.settings.methods])
    captions = [f"batch {size}: {found.words}" for size, found in result.by_batch.items()]
    few = [name for name, (_, count) in groups.items() if count < FEWEST_PROMPTS]
    if few:
        captions.append(f"an interval takes {FEWEST_PROMPTS} batches at least: none for {', '.join(few)}")
    table.caption = "; ".join(captions)
    for name, (methods, _) in groups.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        _add_rows(table, methods)
    return table
