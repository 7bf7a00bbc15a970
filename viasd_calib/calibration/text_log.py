"""The log of a deployed certificate: one JSON line for each text, of what catch-up found of its pending tokens.

A line is appended whole, by one write, and is on the disk before the next text begins. A process that is killed in the
middle leaves at most one unfinished last line: readers say which one it is and leave it out, and who appends next
removes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from viasd_calib.choices import CertificateLossName
from viasd_calib.errors import CalibrationError, StorageError
from viasd_calib.files import describe_os_error
from viasd_calib.schema.base import Audit, Sha256, Share, ShortHash, SpecModel
from viasd_calib.spec import first_problem

Place = Annotated[int, Field(ge=0)]
"""Of a token in an answer, from 0."""


class LoggedTurn(SpecModel):
    """One answered turn.

    Attributes:
        tokens: of the answer.
        pending: places of the tokens that were emitted before q saw them and that a catch-up judged; q decided the
            others itself.
        departed: those of them that are not q's choice, but for rounding.
        deficits: of the departed ones, how far each lies below q's choice: log q(choice) - log q(token), in nats.
    """

    tokens: Annotated[int, Field(gt=0)]
    pending: list[Place]
    departed: list[Place]
    deficits: list[Annotated[float, Field(gt=0)]]

    @model_validator(mode="after")
    def _of_one_answer(self) -> LoggedTurn:
        if len(self.departed) != len(self.deficits):
            raise ValueError(f"{len(self.departed)} departed tokens and {len(self.deficits)} deficits")
        if self.pending != sorted(set(self.pending)) or self.pending[-1:] >= [self.tokens]:
            raise ValueError(f"the pending tokens are not rising places among {self.tokens}")
        if self.departed != sorted(set(self.departed)) or not {*self.departed} <= {*self.pending}:
            raise ValueError("the departed tokens are not rising places among the pending ones")
        return self


class LoggedText(SpecModel):
    """One line of a log: the answers to one prompt.

    Attributes:
        version: of this form.
        policy: digest of the policy that the certificate holds for (:func:`viasd_calib.digest.policy_digest`).
        audit: what was in force. Under ``strict``, as after a fall back, no token departs by construction, and the text
            says nothing of the policy: a monitor leaves it out.
        loss: name of what the certificate bounds.
        value: that loss of this text.
        rounding_gap: deficits up to it, in nats, are q's choice but for rounding, as in the certificate.
        prompt: short hash of its text.
        tokens: emitted, of all turns.
        departures: how many of them are not q's choice.
        turns: what was found of each.
    """

    version: Literal[1] = 1
    policy: Sha256
    audit: Audit
    loss: CertificateLossName
    value: Share
    rounding_gap: Annotated[float, Field(ge=0)]
    prompt: ShortHash
    tokens: Annotated[int, Field(gt=0)]
    departures: Annotated[int, Field(ge=0)]
    turns: list[LoggedTurn] = Field(min_length=1)

    @model_validator(mode="after")
    def _sums(self) -> LoggedText:
        tokens = sum(turn.tokens for turn in self.turns)
        departures = sum(len(turn.departed) for turn in self.turns)
        if (tokens, departures) != (self.tokens, self.departures):
            raise ValueError(
                f"{self.tokens} tokens and {self.departures} departures, and those of its turns sum to {tokens} "
                f"and {departures}"
            )
        return self


@dataclass(frozen=True)
class ReadLog:
    """What a log holds.

    Attributes:
        texts: each with the number of its line, from 1.
        unfinished: number of a last line that does not end; None where there is none.
    """

    path: str
    texts: Sequence[tuple[int, LoggedText]]
    unfinished: int | None

    def place(self, line: int) -> str:
        """Where a line is, as messages name it.

        Example:
            >>> ReadLog("a.jsonl", [], None).place(3)
            'a.jsonl, line 3'
        """
        return f"{self.path}, line {line}"


def read_log(path: str | Path) -> ReadLog:
    """Read a log; a last line that does not end is left out, and named.

    Raises:
        CalibrationError: there is no such file, or a line is no text of a log, naming it.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CalibrationError(f"{path} is missing; viasd generate --log writes one") from error
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror or error}; give the path of a log") from error
    *whole, rest = content.split(b"\n")
    texts: list[tuple[int, LoggedText]] = []
    for number, line in enumerate(whole, 1):
        try:
            texts.append((number, LoggedText.model_validate_json(line)))
        except ValidationError as error:
            raise CalibrationError(
                f"{path}, line {number} is no text of a log ({first_problem(error)}); remove that line, or give a log "
                "that viasd generate --log wrote"
            ) from error
    return ReadLog(str(path), texts, len(whole) + 1 if rest else None)


def append_text(path: str | Path, text: LoggedText) -> None:
    """Append one line, whole, and wait until it is on the disk; an unfinished last line is removed first.

    Processes that append to one file wait for each other, on systems with POSIX locks.

    Raises:
        StorageError: the file cannot be written; it then ends as before, or with an unfinished line.
    """
    line = f"{text.model_dump_json()}\n".encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with _locked(descriptor):
                _remove_unfinished(descriptor)
                written = os.write(descriptor, line)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(describe_os_error(Path(path), error)) from error
    if written < len(line):
        raise StorageError(f"cannot write {path}: no space left on the device; free some space and run again")


def _remove_unfinished(descriptor: int) -> None:
    """Cut a file after its last line that ends."""
    end = whole = os.fstat(descriptor).st_size
    step = 1 << 16
    while whole:
        begin = max(0, whole - step)
        os.lseek(descriptor, begin, os.SEEK_SET)
        found = os.read(descriptor, whole - begin).rfind(b"\n")
        if found >= 0:
            whole = begin + found + 1
            break
        whole = begin
    if whole < end:
        os.ftruncate(descriptor, whole)


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Within it, no other process that asks in the same way writes to a file."""
    if os.name != "posix":
        yield
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
