"""Weights of sublayers on disk, one file each, in the order that they are read.

A file is the bytes of the sublayer's tensors one after the other, each from a multiple of 64 bytes on, and zeros up
to a whole page; beside it lies a description with its hash. Files are written whole or not at all, so that a
conversion that was stopped goes on where it was, and two processes may make the same ones.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from viasd_calib.errors import JobWarning, StorageError
from viasd_calib.files import atomic_path, write_json
from viasd_calib.models.hashes import cache_folder, cached_sha256
from viasd_calib.slim.native.packing import whole
from viasd_calib.spec import Sha256

ALIGNMENT = 64
"""Of a tensor in a file, in bytes: a cache line."""
PAGE = 4096
"""What lengths of files are multiples of, so that they can be read without the system's own cache."""

LAYERS = "layers"
"""Their folder, under the cache folder."""

ELSEWHERE = "set HF_HOME to a folder on another disk"
"""What moves all that is kept."""

VERSION = 1
"""Of the order of weights in files: another one, with another order of any backend."""


class Shape(NamedTuple):
    """Of a tensor, with its number format."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a tensor lies in a file.

    Attributes:
        begin: in bytes.
    """

    begin: int
    shape: Shape

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in a file that has been read to ``buffer``, uint8."""
        sizes, dtype = self.shape
        return buffer[self.begin : self.begin + bytes_of(self.shape)].view(dtype).view(sizes)


def bytes_of(shape: Shape) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape.sizes).numel() * shape.dtype.itemsize


class _Description(BaseModel):
    """What a file must be.

    Attributes:
        tensors: where each begins, its sizes and its number format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: Sha256
    tensors: dict[str, tuple[int, tuple[int, ...], str]]


class SublayerFile(NamedTuple):
    """A sublayer's weights on disk.

    Attributes:
        bytes: length of the file.
        places: of its tensors, by name.
    """

    path: Path
    bytes: int
    places: Mapping[str, Place]


def places_of(shapes: Mapping[str, Shape]) -> tuple[dict[str, Place], int]:
    """Where tensors of these shapes lie in a file, and how long it is.

    Example:
        >>> places, length = places_of({"a": Shape((3,), torch.bfloat16), "b": Shape((2, 2), torch.bfloat16)})
        >>> [place.begin for place in places.values()], length
        ([0, 64], 4096)
    """
    places: dict[str, Place] = {}
    end = 0
    for name, shape in shapes.items():
        begin = whole(end, ALIGNMENT)
        places[name] = Place(begin, shape)
        end = begin + bytes_of(shape)
    return places, whole(end, PAGE)


def files_folder(weights_sha256: str, layout: str) -> Path:
    """Where the files of a model's sublayers lie, under the cache folder.

    Args:
        weights_sha256: hash of the model's weights.
        layout: what order and number format they are in.
    """
    return cache_folder() / LAYERS / weights_sha256 / f"{layout}-{VERSION}"


def sublayer_file(path: Path, shapes: Mapping[str, Shape], make: Callable[[], Mapping[str, Tensor]]) -> SublayerFile:
    """The file of a sublayer, made where it is not there, or, with a warning, is no longer what was written.

    Args:
        shapes: of its tensors, by name.
        make: gives them.

    Raises:
        StorageError: it cannot be written or read.
    """
    places, length = places_of(shapes)
    tensors = {name: (place.begin, place.shape.sizes, str(place.shape.dtype)) for name, place in places.items()}
    if not _is_whole(path, length, tensors):
        content = _joined(make(), places, length)
        digest = hashlib.sha256(content).hexdigest()
        with _told_of_the_cache():
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            write_json(_beside(path), _Description(bytes=length, sha256=digest, tensors=tensors))
    return SublayerFile(path, length, places)


def check_room(paths: Mapping[Path, int]) -> None:
    """Refuse, before the first of them is written, files that the disk has no room for.

    Args:
        paths: of files in one folder, with their lengths; those that are there already take no more.

    Raises:
        StorageError: naming what is needed and what is free.
    """
    missing = {path: length for path, length in paths.items() if not path.exists()}
    if not missing:
        return
    folder = next(iter(missing)).parent
    there = next(one for one in folder.parents if one.is_dir())
    needed, free = sum(missing.values()), shutil.disk_usage(there).free
    if needed > free:
        raise StorageError(
            f"cannot write {folder}: the verifier's layers take {needed:,} bytes there, and {free:,} are free; free "
            f"some space, or {ELSEWHERE}"
        )


@contextmanager
def _told_of_the_cache() -> Iterator[None]:
    """Within it, an error of writing says what moves the cache."""
    try:
        yield
    except StorageError as error:
        cause = error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        more = f", or {ELSEWHERE}" if full else ": HF_HOME names it"
        raise StorageError(f"{error}{more}") from cause


def _in_the_way(path: Path) -> Path | None:
    """What is no folder and should be one, or the other way round, on the way to a file; None where nothing is."""
    files = [one for one in (path, _beside(path)) if one.is_dir()]
    return next((one for one in path.parents if one.exists() and not one.is_dir()), files[0] if files else None)


def _joined(tensors: Mapping[str, Tensor], places: Mapping[str, Place], length: int) -> memoryview:
    """The content of a file."""
    buffer = torch.zeros(length, dtype=torch.uint8)
    for name, place in places.items():
        place.view(buffer).copy_(tensors[name])
    return bytes_of_tensor(buffer)


def bytes_of_tensor(tensor: Tensor) -> memoryview:
    """The memory of a tensor of uint8, to read from or to write to."""
    array: Any = tensor.numpy()
    return memoryview(array)


def _is_whole(path: Path, length: int, tensors: Mapping[str, tuple[int, tuple[int, ...], str]]) -> bool:
    """Whether a file is what its description says, and that what is wanted."""
    between = _in_the_way(path)
    if between is not None:
        kind = "a folder" if between.is_dir() else "no folder"
        raise StorageError(f"cannot read {path}: {between} is {kind}; remove that and run again")
    try:
        described = _Description.model_validate_json(_beside(path).read_bytes())
        alike = (described.bytes, described.tensors, path.stat().st_size) == (length, tensors, length)
        if alike and cached_sha256(path) == described.sha256:
            return True
    except FileNotFoundError:  # never made, not finished, or removed
        return False
    except ValidationError:
        pass
    except OSError as error:
        named = error.filename or path
        raise StorageError(f"cannot read {named}: {error.strerror or error}; remove it and run again") from error
    warnings.warn(f"{path} is not what was written; it is made anew", JobWarning, stacklevel=2)
    return False


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")
