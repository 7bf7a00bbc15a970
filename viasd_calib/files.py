"""Atomic writing: a file is either the old one or the whole new one, never a part of it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from viasd_calib.errors import CalibrationError, StorageError, ViasdError

Model = TypeVar("Model", bound=BaseModel)


def read_json(kind: type[Model], path: str | Path, command: str, error: type[ViasdError] = CalibrationError) -> Model:
    """Read a result that :func:`write_json` wrote.

    Args:
        kind: the model that the file holds.
        command: the command that writes such a file; an error names it.
        error: what is raised.

    Raises:
        ViasdError: of the type ``error``, for a file that is missing or damaged.
    """
    try:
        return kind.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise error(f"{path} is missing; run {command} first") from problem
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or problem}; run {command} again") from problem
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise error(f"{path} is damaged ({what}); run {command} again") from problem
    except ValueError as problem:  # no UTF-8
        raise error(f"{path} is damaged ({problem}); run {command} again") from problem


PARTIAL = ".partial"
"""What temporary files end with."""
ABANDONED = 600.0
"""Seconds after which a temporary file that nobody has written to is that of a process that was killed."""


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files below a folder that :func:`atomic_path` could not, since their process was killed.

    Those that were written to a short time ago may be those of a process that runs, and stay. So do those of a folder
    that only others may write to, as of a cache that many read: they are in nobody's way.

    Raises:
        StorageError: the disk cannot remove one of them.
    """
    for path in folder.rglob(f".*{PARTIAL}"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process was first
            continue
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                continue
            raise StorageError(f"cannot remove {path}: {error.strerror or error}; remove it yourself") from error


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that takes its place when the block ends well.

    Raises:
        StorageError: the disk is full or the place cannot be written; ``target`` is as it was.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise StorageError(describe_os_error(target, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def describe_os_error(target: Path, error: OSError) -> str:
    """One sentence on why ``target`` could not be written, and what mends it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write {target}: no space left on the device; free some space and run again"
    return f"cannot write {target}: {error.strerror or error}; choose a folder that can be written"


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(model: BaseModel) -> str:
    """A pydantic model as indented JSON: what :func:`write_json` writes."""
    return model.model_dump_json(indent=2) + "\n"


def write_json(target: Path, model: BaseModel) -> None:
    """Write a pydantic model as indented JSON, atomically."""
    write_text(target, json_text(model))


def write_bytes(target: Path, data: bytes) -> None:
    """Write ``data``, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, atomically; nothing is done where the two are one."""
    if target.exists() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
