"""Where bytes of cold sublayers come from."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from viasd_calib.errors import StorageError
from viasd_calib.slim.offload import reading
from viasd_calib.slim.offload.layer_files import PAGE, Shape, SublayerFile, bytes_of_tensor, sublayer_file
from viasd_calib.slim.offload.reading import DiskSource, HostSource, Throttled, aligned_buffer


def written(folder: Path, count: int) -> list[SublayerFile]:
    """Files of other lengths, each filled with its own number."""
    return [
        sublayer_file(
            folder / f"{number}.bin",
            {"a": Shape((number + 1, PAGE), torch.uint8)},
            lambda number=number: {"a": torch.full((number + 1, PAGE), number, dtype=torch.uint8)},  # type: ignore[misc]
        )
        for number in range(count)
    ]


def test_sources_agree(tmp_path: Path) -> None:
    files = written(tmp_path, 3)
    host, disk = HostSource(files), DiskSource(files)
    for position in (2, 0, 1):
        for source in (host, disk, Throttled(disk, 1e12)):
            buffer = aligned_buffer(3 * PAGE)
            source.read(position, bytes_of_tensor(buffer)[: files[position].bytes])
            assert buffer[: (position + 1) * PAGE].eq(position).all()
            assert buffer[(position + 1) * PAGE :].eq(0).all()


def test_a_slower_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read takes its bytes over the rate, less what it took already."""
    files, slept = written(tmp_path, 2), list[float]()
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(reading.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(reading.time, "sleep", slept.append)
    Throttled(DiskSource(files), PAGE).read(1, bytes_of_tensor(aligned_buffer(2 * PAGE)))
    assert slept == [1.5]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Those that were opened before it are closed again."""
    files = written(tmp_path, 2)
    files[1].path.unlink()
    with pytest.raises(StorageError, match=f"cannot read {files[1].path}: No such file or directory; run again"):
        DiskSource(files)


def test_reads_that_end_early_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may give less than was asked for, in whole pages."""
    files = written(tmp_path, 3)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, into, begin: read(descriptor, [into[0][:PAGE]], begin))
    buffer = aligned_buffer(3 * PAGE)
    DiskSource(files).read(2, bytes_of_tensor(buffer))
    assert buffer.eq(2).all()


@pytest.mark.skipif(not reading.DIRECT, reason="there are no direct reads here")
def test_a_file_system_that_refuses_each_direct_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, read = written(tmp_path, 2), os.preadv

    def refuse(descriptor: int, into: list[memoryview], begin: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & reading.DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, into, begin)

    monkeypatch.setattr(os, "preadv", refuse)
    source, buffer = DiskSource(files), aligned_buffer(2 * PAGE)
    for _ in range(2):
        source.read(1, bytes_of_tensor(buffer))
        assert buffer.eq(1).all()

    def refuse_all(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse_all)
    with pytest.raises(StorageError, match="cannot read"):
        source.read(0, bytes_of_tensor(buffer))


def test_buffers_begin_with_a_page() -> None:
    buffer = aligned_buffer(PAGE)
    assert buffer.data_ptr() % PAGE == 0
    assert buffer.eq(0).all()
