"""What ``gpu.json`` holds: the machine, and every check with its outcome and its numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Outcome = Literal["passed", "failed", "not run"]

CHECKS_VARIABLE = "VIASD_GPU_CHECKS"
"""Environment variable of a step's process: the file to which it writes its checks, one JSON object a line."""


class Check(BaseModel):
    """One test or one measurement.

    Attributes:
        reason: why it failed or did not run.
        numbers: what it measured, by name.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    outcome: Outcome
    seconds: float = 0.0
    reason: str | None = None
    numbers: dict[str, Any] = Field(default_factory=dict)


class StepResult(BaseModel):
    """The checks of one process.

    Attributes:
        budget: seconds that it may take.
        stopped: whether the time ended before it had.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    outcome: Outcome = "not run"
    budget: float
    seconds: float = 0.0
    reason: str | None = "the run ended before it"
    stopped: bool = True
    checks: list[Check] = Field(default_factory=list)

    def count(self, outcome: Outcome) -> int:
        """Checks with an outcome."""
        return sum(check.outcome == outcome for check in self.checks)


class GpuRecord(BaseModel):
    """The file ``gpu.json``.

    Attributes:
        began: date and time, UTC.
        commit: of the source, with ``-dirty`` where files were changed; None outside a git repository.
        machine: device, driver, memory and versions.
        models: as they were given.
        budget: seconds that the whole run may take.
        finished: whether the run came to its end.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["gpu_record"] = "gpu_record"
    schema_version: str = "1.0"
    began: str
    commit: str | None
    machine: dict[str, Any]
    models: list[str]
    budget: float
    seconds: float = 0.0
    finished: bool = False
    steps: list[StepResult]

    @property
    def exit_code(self) -> int:
        """1 where a check failed, 2 where none did but the time ended before the last step had, 0 otherwise."""
        if any(step.outcome == "failed" for step in self.steps):
            return 1
        return 2 if any(step.stopped for step in self.steps) else 0


class CheckLog:
    """The lines that a step's process writes while it runs, so that what ends it loses no check that is done."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def announce(self, names: Sequence[str]) -> None:
        """Name the checks to come."""
        self._write({"announced": list(names)})

    def begin(self, name: str) -> None:
        """Name the check that runs from here on."""
        self._write({"begun": name})

    def note(self, check: Check) -> None:
        """Add a check that is done."""
        self._write({"done": check.model_dump(mode="json")})

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")


class ReadLog:
    """What a step's process wrote.

    Attributes:
        done: its checks.
        running: the check that had begun and was not done; None for none.
        waiting: the others that were announced.
    """

    def __init__(self, path: Path) -> None:
        self.done: list[Check] = []
        names: list[str] = []
        self.running: str | None = None
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # a cut last line is none
        for line in lines:
            entry = json.loads(line)
            names += entry.get("announced", [])
            if "begun" in entry:
                self.running = entry["begun"]
            if "done" in entry:
                self.done.append(Check.model_validate(entry["done"]))
                self.running = None
        known = {check.name for check in self.done} | {self.running}
        self.waiting = [name for name in names if name not in known]
