"""``python -m tests.gpu``: what ``make gpu`` runs."""

from __future__ import annotations

import argparse
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from tests.gpu.harness import Step, run_steps
from tests.gpu.machine import commit, machine
from tests.gpu.measure import check_name
from tests.gpu.record import GpuRecord, StepResult
from tests.gpu.settings import SETTINGS_VARIABLE, Settings
from tests.gpu.summary import step_line, summary
from tests.gpu.targets import measured_targets
from viasd_calib.devices import check_device
from viasd_calib.errors import ViasdError

HERE = Path(__file__).parent
BUDGET = 470.0
"""Seconds of all steps: eight minutes, less the start and the end."""

CHECKS = {"kernels": 60.0, "low_bit": 45.0, "sampling": 75.0, "exactness": 75.0, "offload": 40.0, "graphs": 120.0}
"""Files of tests, ``test_NAME.py``, and the seconds that each may take; in order."""
PROFILE_SECONDS, BENCH_SECONDS, COMPILED_SECONDS = 60.0, 90.0, 120.0


def all_steps(settings: Settings) -> list[Step]:
    """Checks first, then every model's profile and benchmark, then backend ``compiled``.

    Raises:
        ModelError: a model that is not there.
    """
    environment = {SETTINGS_VARIABLE: settings.model_dump_json()}
    interpreted = {} if settings.device.startswith("cuda") else {"TRITON_INTERPRET": "1"}
    steps = []
    for name, budget in CHECKS.items():
        # Older versions of libraries warn of what newer ones of others have dropped, which is not asked here.
        options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings="]
        words = [sys.executable, "-m", "pytest", *options, str(HERE / f"test_{name}.py")]
        own = environment | (interpreted if name == "kernels" else {})
        steps.append(Step(name, words, budget, environment=own))
    targets = measured_targets(settings)
    measured = [(target, "eager", what) for target in targets for what in ("profile", "bench")]
    if not settings.small:
        measured += [(target, "compiled", "bench") for target in targets]
    for target, backend, what in measured:
        words = [sys.executable, "-m", "tests.gpu.measure", what, target.name, backend]
        eager = PROFILE_SECONDS if what == "profile" else BENCH_SECONDS
        budget = COMPILED_SECONDS if backend == "compiled" else eager
        steps.append(Step(check_name(what, target.name, backend), words, budget, True, environment))
    return steps


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options of ``python -m tests.gpu``."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Check and measure on a GPU.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:NUMBER, or cpu for a try of the harness")
    parser.add_argument("--models", nargs="*", default=[], help="model folders, .gguf files, specs, folders of models")
    parser.add_argument("--out", default="gpu.json", help="the JSON file")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all steps together")
    parser.add_argument("--small", action="store_true", help="without SmolLM2, and measure little")
    return parser.parse_args(words)


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # the running step is stopped, and what is done stays written


def main(words: list[str] | None = None) -> int:
    """Run everything; 0 where all passed, 1 where a check failed, 2 where the time ended first or nothing began."""
    chosen = parse(words)
    models = [str(Path(one).resolve()) for one in chosen.models]
    settings = Settings(device=chosen.device, models=models, small=chosen.small)
    try:
        check_device(settings.device)
        steps = all_steps(settings)
    except ViasdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    signal.signal(signal.SIGTERM, _end)
    record = GpuRecord(
        began=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(torch.device(settings.device)),
        models=chosen.models,
        budget=chosen.budget,
        steps=[],
    )

    def tell(step: StepResult) -> None:
        console.print(step_line(step), markup=False, highlight=False)

    record = run_steps(steps, record, Path(chosen.out), tell)
    for part in summary(record):
        console.print(part)
    console.print(f"wrote {chosen.out}", markup=False, highlight=False)
    return record.exit_code


if __name__ == "__main__":
    sys.exit(main())
