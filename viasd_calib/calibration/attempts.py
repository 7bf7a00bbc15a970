"""Earlier attempts to certify something on the same prompts: whoever tries again and again finds a lucky run.

Attempt k is tested at the level (1 - confidence) / 2^k, so that all attempts together are wrong with a probability of
at most 1 - confidence, however many there are. They are noted beside the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from viasd_calib.file_names import ATTEMPTS_FILE
from viasd_calib.files import read_json, write_json


class Attempt(BaseModel):
    """One attempt, noted before its first prompt is decoded.

    Attributes:
        loss: name of what was to be bounded.
        max_loss: by how much.
        prompts: short hashes of the calibrate prompts' texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: str
    max_loss: float
    prompts: list[str]


class Attempts(BaseModel):
    """All attempts with one fit, in their order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attempts: tuple[Attempt, ...] = ()


def earlier_attempts(folder: Path, prompts: Sequence[str]) -> int:
    """How many attempts with the fit in ``folder`` have looked at one of these prompts, or more.

    Args:
        prompts: short hashes of their texts.

    Raises:
        CalibrationError: the file is damaged.
    """
    return sum(not set(prompts).isdisjoint(one.prompts) for one in _read(folder).attempts)


def note_attempt(folder: Path, attempt: Attempt, least: int = 1) -> int:
    """Note an attempt that begins now; its number among those on the same prompts, from 1.

    Args:
        least: the number at least, where others were made with other fits.

    Raises:
        CalibrationError: the file is damaged.
        StorageError: it cannot be written.
    """
    number = max(least, 1 + earlier_attempts(folder, attempt.prompts))
    write_json(folder / ATTEMPTS_FILE, Attempts(attempts=(*_read(folder).attempts, attempt)))
    return number


def _read(folder: Path) -> Attempts:
    path = folder / ATTEMPTS_FILE
    return read_json(Attempts, path, "viasd calibrate") if path.is_file() else Attempts()
