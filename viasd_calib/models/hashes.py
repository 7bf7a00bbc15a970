"""SHA-256 of large files, computed once: a note of each lies in the cache folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from viasd_calib.errors import StorageError
from viasd_calib.files import write_json
from viasd_calib.spec import Sha256, file_sha256

_BLOB = re.compile(r"[0-9a-f]{64}")
"""Name of a large file in a hub cache: its hash. A small file is named by the hash of git, which is shorter."""


SMALL = 2**24
"""Bytes below which a file is not worth a note: it is read in a hundredth of a second."""


class _Note(BaseModel):
    """What a file was like when it was hashed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: Sha256


def cache_folder() -> Path:
    """Where converted models are kept: under ``HF_HOME``, else ``XDG_CACHE_HOME``, else ``~/.cache``.

    A variable that is empty is taken as unset.
    """
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "viasd_calib"


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file, read only where it has changed since it was last asked for.

    A file in a hub cache is named by its hash, and is not read at all; a small one is read each time. A note that is
    damaged, or that another process has removed, is made anew; where none can be written the hash is computed each
    time.

    Raises:
        OSError: the file cannot be read.
    """
    path = path.resolve()
    if path.parent.name == "blobs" and _BLOB.fullmatch(path.name):
        return path.name
    before = _stamp(path)
    if before[0] < SMALL:
        return file_sha256(path)
    place = cache_folder() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    noted = _read(place)
    if noted is not None and (noted.path, noted.size, noted.mtime_ns, noted.ctime_ns) == (str(path), *before):
        return noted.sha256
    digest = file_sha256(path)
    if _stamp(path) == before:  # else it is being written
        size, mtime_ns, ctime_ns = before
        try:
            write_json(place, _Note(path=str(path), size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns, sha256=digest))
        except StorageError:  # a cache that cannot be written costs time alone
            return digest
    return digest


def files_sha256(files: Mapping[str, Path]) -> str:
    """Hash of several files together, by name and content.

    Raises:
        OSError: one of them cannot be read.
    """
    lines = (f"{name}\t{cached_sha256(path)}\n" for name, path in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size and times: of a change of the content, and of anything at all (a copy may keep the former)."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(place: Path) -> _Note | None:
    try:
        return _Note.model_validate_json(place.read_bytes())
    except (OSError, ValidationError):
        return None
