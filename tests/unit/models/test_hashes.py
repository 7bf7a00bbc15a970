from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from viasd_calib.models import cached_sha256, hashes
from viasd_calib.spec import file_sha256


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and every file large enough for a note."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SMALL", 0)
    return tmp_path / "cache" / "viasd_calib" / "hashes"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their hash."""
    found: list[Path] = []

    def counted(path: Path) -> str:
        found.append(path)
        return file_sha256(path)

    monkeypatch.setattr(hashes, "file_sha256", counted)
    return found


def test_a_file_is_read_once(notes: Path, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert [cached_sha256(path) for _ in range(3)] == [file_sha256(path)] * 3
    assert reads == [path]
    (note,) = notes.iterdir()
    assert json.loads(note.read_text())["path"] == str(path)


def test_a_file_that_changed_is_read_again(notes: Path, tmp_path: Path, reads: list[Path]) -> None:
    """Also one of the same size, given the time of the old one, as a copy that keeps times has it."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before, stamp = cached_sha256(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert cached_sha256(path) == file_sha256(path) != before
    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sha256": "x"}', b"\xff"])
def test_a_damaged_note_is_made_anew(notes: Path, tmp_path: Path, reads: list[Path], content: bytes) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    digest = cached_sha256(path)
    (note,) = notes.iterdir()
    whole = note.read_bytes()
    note.write_bytes(content)
    assert cached_sha256(path) == digest
    assert note.read_bytes() == whole
    assert len(reads) == 2


def test_a_note_of_another_file_is_not_believed(notes: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "weights", tmp_path / "other"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    cached_sha256(path)
    (note,) = notes.iterdir()
    taken = json.loads(note.read_text())
    cached_sha256(other)
    (mine,) = set(notes.iterdir()) - {note}
    mine.write_text(json.dumps(taken))
    assert cached_sha256(other) == file_sha256(other)


def test_without_a_cache_the_hash_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SMALL", 0)
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    assert cached_sha256(tmp_path / "file") == file_sha256(tmp_path / "file")


def test_small_files_leave_no_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert cached_sha256(path) == file_sha256(path)
    assert not (tmp_path / "cache").exists()


def test_a_file_of_the_hubs_cache_is_not_read(notes: Path, tmp_path: Path, reads: list[Path]) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / ("ab" * 32)).write_bytes(b"large")
    (blobs / ("ab" * 20)).write_bytes(b"small, named by git")
    large, small = tmp_path / "model.safetensors", tmp_path / "adapter.safetensors"
    large.symlink_to(blobs / ("ab" * 32))
    small.symlink_to(blobs / ("ab" * 20))
    assert cached_sha256(large) == "ab" * 32
    assert cached_sha256(small) == file_sha256(small)
    assert reads == [blobs / ("ab" * 20)]


def test_many_at_once(notes: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one" * 1000)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(cached_sha256, [path] * 32)) == {file_sha256(path)}
    assert len(list(notes.iterdir())) == 1
