"""What the steps of a long job came to, so that a job that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from viasd_calib import __version__
from viasd_calib.errors import StorageError
from viasd_calib.files import describe_os_error, write_text

Found = TypeVar("Found")


class _Heading(BaseModel):
    """The first line of a ledger: of which job it is."""

    model_config = ConfigDict(extra="forbid")

    job_sha256: str


class _Entry(BaseModel):
    """One line of a ledger: what a step came to, as JSON."""

    model_config = ConfigDict(extra="forbid")

    step: str
    found: str


class Ledger:
    """The steps of one job that are done, in a file beside the job's result.

    Each is a line, on the disk before the next step begins. A last line that a kill cut short is not counted: its
    step is done again. A ledger of a job with other options, or of another version of this package, is begun anew.

    Args:
        path: of the file; None keeps nothing.
        job: everything that decides what the steps come to, as JSON can hold it.

    Raises:
        StorageError: the file cannot be read or written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "squares.steps"
        >>> Ledger(path, {"power": 2}).recall("of 7", int, lambda: 7**2)
        49
        >>> Ledger(path, {"power": 2}).recall("of 7", int, lambda: 1 / 0)  # nothing is computed
        49
        >>> Ledger(path, {"power": 3}).recall("of 7", int, lambda: 7**3)
        343
        >>> folder.cleanup()
    """

    def __init__(self, path: Path | None = None, job: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._found: dict[str, str] = {}
        if path is not None:
            self._begin(path, _hash(job or {}))

    def _begin(self, path: Path, job: str) -> None:
        lines = _whole_lines(path)
        if lines and _parsed(_Heading, lines[0]) == _Heading(job_sha256=job):
            entries = [_parsed(_Entry, line) for line in lines[1:]]
            self._found = {entry.step: entry.found for entry in entries if entry is not None}
        kept = (_Entry(step=step, found=found) for step, found in self._found.items())
        heading = _Heading(job_sha256=job).model_dump_json()
        write_text(path, "".join(f"{line}\n" for line in (heading, *(entry.model_dump_json() for entry in kept))))

    @property
    def steps_done(self) -> int:
        """How many steps are in it."""
        return len(self._found)

    def holds(self, step: str) -> bool:
        """Whether a step of this name is done."""
        return step in self._found

    def recall(self, step: str, kind: type[Found], compute: Callable[[], Found]) -> Found:
        """What a step came to: as it was noted, or else computed now and noted.

        Args:
            step: its name, unique in the job.
            kind: what pydantic reads it back as.

        Raises:
            StorageError: it cannot be written.
        """
        adapter = TypeAdapter(kind)
        if step in self._found:
            try:
                return adapter.validate_json(self._found[step])
            except ValidationError:
                del self._found[step]  # noted in a form that is no longer read: it is done again
        found = compute()
        if self.path is not None:
            self._note(self.path, _Entry(step=step, found=adapter.dump_json(found).decode()))
        return found

    def _note(self, path: Path, entry: _Entry) -> None:
        self._found[entry.step] = entry.found
        try:
            with path.open("a", encoding="utf-8") as target:
                target.write(f"{entry.model_dump_json()}\n")
                target.flush()
                os.fsync(target.fileno())
        except OSError as error:
            raise StorageError(describe_os_error(path, error)) from error

    def close(self) -> None:
        """Remove the file: the job's result has been written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def ledger_beside(result: str | Path, job: Mapping[str, Any]) -> Ledger:
    """The ledger of the job whose result is written to ``result``."""
    return Ledger(steps_beside(result), job)


def steps_beside(result: str | Path) -> Path:
    """Where that ledger lies, if it is there."""
    path = Path(result)
    return path.with_name(f"{path.name}.steps")


def _hash(job: Mapping[str, Any]) -> str:
    named = {"version": __version__, "job": job}
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()


def _whole_lines(path: Path) -> list[str]:
    """The lines that end; none where there is no file."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")  # what was cut may end within a character
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; remove it to begin anew") from error
    return text.split("\n")[:-1]


Line = TypeVar("Line", bound=BaseModel)


def _parsed(kind: type[Line], line: str) -> Line | None:
    try:
        return kind.model_validate_json(line)
    except ValidationError:
        return None
