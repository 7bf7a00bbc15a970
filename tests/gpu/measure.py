"""Measures one model: ``python -m tests.gpu.measure profile|bench TARGET BACKEND``; results go to the step's log.

Both are the functions behind ``viasd profile`` and ``viasd bench``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from tests.gpu.record import CHECKS_VARIABLE, Check, CheckLog
from tests.gpu.settings import Settings, read_settings
from tests.gpu.targets import TINY, OpenTarget, find_targets, open_target
from viasd_calib.choices import BENCH_METHODS, Backend
from viasd_calib.devices import check_device
from viasd_calib.evaluation.bench import BenchResult, unexplained
from viasd_calib.pipeline.bench import bench
from viasd_calib.pipeline.options import BenchOptions, ProfileOptions
from viasd_calib.pipeline.profile import profile
from viasd_calib.slim.backends import fastest_dtype
from viasd_calib.spec import DType

COMPILED_METHODS = ("autoregressive", "speculative", "three_tier")
"""What is decoded on backend ``compiled``, whose passes have to be compiled first."""

Numbers = dict[str, Any]


class UnexplainedError(Exception):
    """A lossless method left the autoregressive text by more than rounding; its numbers are kept.

    Attributes:
        numbers: of the benchmark.
    """

    def __init__(self, message: str, numbers: Numbers) -> None:
        super().__init__(message)
        self.numbers = numbers


def dtype_of(target: OpenTarget, device: torch.device) -> DType:
    """float32 for the tiny model, else the number format that the device is fastest in."""
    return "float32" if target.target.name == TINY else fastest_dtype(device)


def models_of(target: OpenTarget, settings: Settings, backend: Backend) -> dict[str, Any]:
    """The options of both measurements that say what runs, and where."""
    return {
        "spec": str(target.spec),
        "verifier": target.target.verifier,
        "draft_model": target.target.draft_model,
        "device": settings.device,
        "dtype": dtype_of(target, torch.device(settings.device)),
        "backend": backend,
    }


def measure_profile(target: OpenTarget, settings: Settings, backend: Backend, folder: Path) -> Numbers:
    """Milliseconds of passes by width, context and batch, and of decoded tokens by method and context."""
    tiny = target.target.name == TINY
    result = profile(
        ProfileOptions(
            **models_of(target, settings, backend),
            json=str(folder / "profile.json"),
            widths=(1, 4) if settings.small else (1, 2, 4, 8, 16),
            contexts=(16,) if settings.small else (32, 128) if tiny else (128, 1024),
            batches=(1, 2) if settings.small else (1, 4, 16),
            repeats=2 if settings.small else 7,
        )
    )
    passes = [
        {**one.shape._asdict(), "ms": 1000 * one.seconds, "low": 1000 * one.low, "high": 1000 * one.high}
        for one in result.measured
    ]
    rounds = [
        {"method": one.method, "context": one.context, "ms_per_token": 1000 * one.total, "rest_share": one.rest_share}
        for one in result.rounds
    ]
    return {"dtype": result.dtype, "backend": result.backend, "passes": passes, "rounds": rounds}


def measure_bench(target: OpenTarget, settings: Settings, backend: Backend, folder: Path) -> Numbers:
    """Speeds of all methods on a few prompts; three on backend ``compiled``.

    Raises:
        UnexplainedError: a lossless method is not.
    """
    methods = COMPILED_METHODS if backend == "compiled" else BENCH_METHODS
    result = bench(
        BenchOptions(
            **models_of(target, settings, backend),
            json=str(folder / "bench.json"),
            methods=",".join(methods),
            audit="strict",
            prompts=target.prompts,
            limit=2 if settings.small else 4,
            max_new_tokens=6 if settings.small else 32,
        )
    )
    numbers = bench_numbers(result)
    found = unexplained(result)
    if found:
        name, first = found[0]
        message = f"{name} left the autoregressive text at token {first.place} of {first.prompt_id}, gap {first.gap}"
        raise UnexplainedError(f"{message} ({len(found)} such texts)", numbers)
    return numbers


def bench_numbers(result: BenchResult) -> Numbers:
    """What the record keeps of a benchmark."""
    methods = {}
    for name, row in result.methods.items():
        faster = row.speedup_vs_autoregressive
        methods[name] = {
            "tokens_per_second": row.tokens_per_second,
            "speedup_vs_autoregressive": None if faster is None else faster.median,
            "identical_to_autoregressive": row.identical_to_autoregressive,
            "full_passes_per_token": row.full_passes_per_token,
            "slim_passes_per_token": row.slim_passes_per_token,
        }
    return {
        "prompts": result.n_prompts,
        "max_new_tokens": result.settings.max_new_tokens,
        "dtype": result.settings.dtype,
        "backend": result.settings.backend,
        "methods": methods,
    }


MEASUREMENTS: dict[str, Callable[[OpenTarget, Settings, Backend, Path], Numbers]] = {
    "profile": measure_profile,
    "bench": measure_bench,
}


def check_name(what: str, target: str, backend: str) -> str:
    """The name of a measurement, as a step and as a check."""
    return f"{what} {target} {backend}"


def measure(what: str, name: str, backend: Backend, settings: Settings, log: CheckLog) -> bool:
    """Run one measurement, and note it whether it works or not; returns whether it did."""
    check = Check(name=check_name(what, name, backend), outcome="passed")
    log.announce([check.name])
    log.begin(check.name)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="viasd-gpu-") as folder:
        try:
            check_device(settings.device)
            target = next(one for one in find_targets(settings) if one.name == name)
            opened = open_target(target, Path(folder), torch.device(settings.device))
            check.numbers = {"fitted": target.fitted}
            check.numbers |= MEASUREMENTS[what](opened, settings, backend, Path(folder))
        except UnexplainedError as error:
            check.outcome, check.reason = "failed", str(error)
            check.numbers |= error.numbers
        except Exception:  # whatever it is: it goes into the record, and the exit code tells
            check.outcome, check.reason = "failed", traceback.format_exc()[-2000:]
    check.seconds = round(time.perf_counter() - began, 3)
    log.note(check)
    return check.outcome == "passed"


def main(words: list[str]) -> int:
    """The measurement that the command line names."""
    what, name, backend = words
    chosen: Backend = next(one for one in get_args(Backend) if one == backend)
    return 0 if measure(what, name, chosen, read_settings(), CheckLog(os.environ[CHECKS_VARIABLE])) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
