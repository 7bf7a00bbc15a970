"""``viasd bench``."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from rich.console import Console

from viasd_calib.cli import command_line
from viasd_calib.cli.caches import megabytes
from viasd_calib.cli.notices import say_written
from viasd_calib.errors import BenchError
from viasd_calib.pipeline import bench as job
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.options import BenchOptions


def bench(options: BenchOptions, load: lazy_types.LoadVerifier | None = None) -> None:
    """Measure, print the tables, and fail where a lossless method is not.

    Raises:
        BenchError: a lossless method differs by more than rounding.
    """
    result = job.bench(options, load, command_line.get())

    from viasd_calib.evaluation.against_baselines import against_baselines
    from viasd_calib.evaluation.method_columns import bench_table, group_tables

    console = Console()
    console.print(bench_table(result))
    for table in group_tables(result):
        console.print(table)
    for line in [*against_baselines(result), *describe_differences(result), *describe_memory(result)]:
        console.print(line)
    say_written(options.json)
    refuse_unexplained(result)


def describe_memory(result: lazy_types.BenchResult) -> list[str]:
    """A line on the peak of memory where layers are read for each pass, beside that of the verifier alone in memory."""
    found = result.offload
    together = [
        f"peak of memory in batches of {size}: {_highest(one.peak_memory_bytes)[0]}"
        for size, one in result.by_batch.items()
        if one.peak_memory_bytes
    ]
    if found is None or not found.peak_memory_bytes:
        return together
    words, peak = _highest(found.peak_memory_bytes)
    line = f"peak of memory: {words}"
    allowed = found.allowed_peak()
    if allowed is None or found.plain_peak_memory_bytes is None:
        return [line, *together]
    kept = "below" if peak <= allowed else "above"
    return [
        f"{line}; the verifier alone in memory takes {megabytes(found.plain_peak_memory_bytes)}. Less 80 % of "
        f"{megabytes(found.cold_bytes)} that are read, and with {megabytes(found.slim_bytes)} of the slim verifier and "
        f"{megabytes(found.drafter_bytes)} of the drafter, that is {megabytes(allowed)}: the peak is {kept} it",
        *together,
    ]


def _highest(peaks: Mapping[str, int]) -> tuple[str, int]:
    """The highest peak, in words with its method, and in bytes."""
    name, peak = max(peaks.items(), key=lambda one: one[1])
    return f"{megabytes(peak)} MB ({name})", peak


def describe_differences(result: lazy_types.BenchResult) -> list[str]:
    """A line for each method of which some text leaves the autoregressive one at a near tie."""
    lines = []
    every = [*result.methods.items()]
    for size, found in result.by_batch.items():
        every += [(f"{name} in batches of {size}", method) for name, method in found.methods.items()]
    for name, method in every:
        gaps = [abs(one.gap) for one in method.differences if one.gap is not None and one.explained]
        if gaps:
            lines.append(
                f"{name}: {len(gaps)} of {result.n_prompts} prompts leave the autoregressive text where the verifier is"
                f" nearly tied: median gap {median(gaps):.3g}, widest {max(gaps):.3g} ({result.settings.dtype} logits)"
            )
    return lines


def refuse_unexplained(result: lazy_types.BenchResult) -> None:
    """Fail on a lossless method that differs by more than rounding.

    Raises:
        BenchError: naming the first such text.
    """
    from viasd_calib.evaluation.bench import unexplained

    found = unexplained(result)
    if found:
        name, first = found[0]
        gap = "an end of text" if first.gap is None else f"a gap of {first.gap:.3g}"
        raise BenchError(
            f"{name} is lossless, but left the autoregressive text at token {first.place} of {first.prompt_id} by "
            f"{gap}, where rounding explains {first.near_tie:.3g} ({len(found)} such texts); the JSON is written, "
            "please report it"
        )
