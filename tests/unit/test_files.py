from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.tiny import small_disk
from viasd_calib import files
from viasd_calib.errors import CalibrationError, StorageError
from viasd_calib.files import (
    PARTIAL,
    atomic_path,
    copy_file,
    describe_os_error,
    read_json,
    remove_abandoned,
    write_bytes,
    write_text,
)


def test_writes_the_whole_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "note.txt"
    write_text(target, "grüße\n")
    assert target.read_bytes() == "grüße\n".encode()
    assert list(target.parent.iterdir()) == [target]


def test_the_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_bytes(tmp_path / "shared", b"x")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_inside_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise error

    target = tmp_path / "note.txt"
    write_text(target, "old")
    with pytest.raises(type(error)):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    def write_to_full_device() -> None:
        with atomic_path(target) as place:
            place.unlink()
            place.symlink_to("/dev/full")
            place.write_bytes(b"x" * 100_000)

    target = tmp_path / "note.txt"
    write_text(target, "old")
    with pytest.raises(StorageError, match=r"note\.txt: no space left.*free some space"):
        write_to_full_device()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_the_kernel_lets_not_grow(tmp_path: Path) -> None:
    target = tmp_path / "tensors.bin"
    write_bytes(target, b"old")
    with pytest.raises(StorageError, match=r"tensors\.bin"), small_disk(1000):
        write_bytes(target, b"x" * 100_000)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("step", ["fsync", "replace", "mkstemp"])
def test_no_space_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "note.txt"
    write_text(target, "old")
    owner = {"fsync": "os.fsync", "replace": "pathlib.Path.replace", "mkstemp": "tempfile.mkstemp"}[step]
    with monkeypatch.context() as patched:
        patched.setattr(owner, full)
        with pytest.raises(StorageError, match=r"note\.txt: no space left"):
            write_text(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file/note\.txt.*choose a folder"):
        write_text(tmp_path / "file" / "note.txt", "new")


def test_a_target_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="taken"):
        write_text(tmp_path / "taken", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_quota_counts_as_a_full_disk() -> None:
    assert "no space left" in describe_os_error(Path("a"), OSError(errno.EDQUOT, "quota"))
    assert "no space left" not in describe_os_error(Path("a"), OSError(errno.EACCES, "denied"))


def test_a_copy_takes_the_place_of_the_old_file_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(b"x" * 5000)
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    source.write_bytes(b"y" * 5000)
    with pytest.raises(StorageError), small_disk(1000):
        copy_file(source, target)
    assert target.read_bytes() == b"x" * 5000
    copy_file(target, target)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; run viasd x first"),
        (b"{", "is damaged (Invalid JSON"),
        (b'{"size": "a"}', "is damaged (size: Input should be a valid integer"),
        (b"\xff", "is damaged ('utf-8' codec"),
    ],
)
def test_what_is_missing_and_what_is_damaged_is_told_apart(content: bytes | None, message: str, tmp_path: Path) -> None:
    class Result(BaseModel):
        size: int

    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError) as refused:
        read_json(Result, path, "viasd x")
    assert message in str(refused.value)


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    left, running = tmp_path / "inside" / ".a.bin.x1.partial", tmp_path / ".b.bin.x2.partial"
    named, kept = tmp_path / "c.partial", tmp_path / "a.bin"
    for path in (left, running, named, kept):
        path.write_bytes(b"12")
    for path in (left, named, kept):
        os.utime(path, (1e9, 1e9))
    for _ in range(2):
        remove_abandoned(tmp_path)
        assert [path for path in (left, running, named, kept) if path.exists()] == [running, named, kept]
    remove_abandoned(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO])
def test_what_only_others_may_remove_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A cache that many read may hold what a killed process of its owner left; a disk that fails is told."""
    left = tmp_path / f".layer.x{PARTIAL}"
    left.write_bytes(b"")
    os.utime(left, (0, 0))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match="cannot remove") if number == errno.EIO else nullcontext():
        remove_abandoned(tmp_path)
    assert left.exists()


def test_a_temporary_file_is_one_that_would_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ABANDONED", -1.0)
    with atomic_path(tmp_path / "a.json") as temporary:
        assert temporary.exists()
        remove_abandoned(tmp_path)
        assert not temporary.exists()
        temporary.write_bytes(b"")
