"""Runs steps one after the other, each in a process of its own, within its time and that of the whole.

A process of its own, because an illegal access on a GPU spoils all later work of the process, and because only a
process can be stopped in the middle of a kernel or of a compilation.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu.record import CHECKS_VARIABLE, Check, GpuRecord, ReadLog, StepResult
from viasd_calib.files import write_json

LEAST_SECONDS = 5.0
"""A step is not begun with less time than it takes to import PyTorch."""
TAIL = 2000
"""Characters of a process's output that are kept where it failed."""

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        command: its words.
        budget: seconds that it may take.
        measures: whether it measures: then a check that runs out of time is not run, not failed.
        environment: added to this process's own.
    """

    name: str
    command: Sequence[str]
    budget: float
    measures: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def run_steps(
    steps: Sequence[Step], record: GpuRecord, out: Path, tell: Callable[[StepResult], None] = lambda _: None
) -> GpuRecord:
    """Run all steps, and write the record before the first and after each.

    Args:
        record: with nothing run yet; its budget is the time of all steps together.
        out: the JSON file, replaced atomically.
        tell: is given each step that has ended.
    """
    started = time.monotonic()
    record = record.model_copy(update={"steps": [StepResult(name=step.name, budget=step.budget) for step in steps]})
    write_json(out, record)
    for number, step in enumerate(steps):
        left = record.budget - (time.monotonic() - started)
        if left < LEAST_SECONDS:
            reason = f"the budget of {record.budget:g} s was used up"
            result = StepResult(name=step.name, budget=step.budget, reason=reason)
        else:
            result = run_step(step, min(step.budget, left))
        record.steps[number] = result
        record.seconds = round(time.monotonic() - started, 3)
        write_json(out, record)
        tell(result)
    record.finished = True
    write_json(out, record)
    return record


def run_step(step: Step, limit: float) -> StepResult:
    """Run one process for at most ``limit`` seconds, and read its checks."""
    with tempfile.TemporaryDirectory(prefix="viasd-gpu-") as folder:
        checks, log = Path(folder) / "checks.jsonl", Path(folder) / "output.txt"
        environment = {**os.environ, **step.environment, CHECKS_VARIABLE: str(checks)}
        started = time.monotonic()
        with log.open("wb") as output:
            # A session of its own, so that the processes that it starts are stopped with it. Its standard input ends
            # when this process does.
            process = subprocess.Popen(
                step.command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                cwd=ROOT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _stop(process)
        seconds = time.monotonic() - started
        tail = log.read_bytes().decode("utf-8", "replace")[-TAIL:].strip()
        return _result(step, ReadLog(checks), code, limit, seconds, tail)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _result(step: Step, read: ReadLog, code: int | None, limit: float, seconds: float, tail: str) -> StepResult:
    """A step's outcome from its checks and from how its process ended; ``code`` is None where it was stopped."""
    stopped = code is None
    checks = list(read.done)
    ended = f"stopped after {limit:.0f} s" if stopped else f"its process ended with code {code}"
    if read.running is not None:
        had_its_time = not step.measures and limit >= step.budget
        outcome = "not run" if stopped and not had_its_time else "failed"
        checks.append(Check(name=read.running, outcome=outcome, reason=ended))
    checks += [Check(name=name, outcome="not run", reason=ended) for name in read.waiting]
    broken = code not in (0, None) and not any(check.outcome == "failed" for check in checks)
    result = StepResult(
        name=step.name, budget=step.budget, seconds=round(seconds, 3), stopped=stopped, reason=None, checks=checks
    )
    if broken or result.count("failed"):
        result.outcome, result.reason = "failed", f"{ended}\n{tail}" if broken else None
    elif stopped:
        result.outcome, result.reason = "not run", ended
    elif result.count("passed"):
        result.outcome = "passed"
    else:
        result.reason = "no check could run here" if checks else "it has no checks"
    return result
