"""Files of sublayers: written whole or not at all, made anew where they are not what was written, refused when they
change while they are read."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.offload_cases import LOW_BITS, cold, engine, logits, save_verifier, started, text, texts, write_spec
from tests.tiny import small_disk
from viasd_calib.decoding.engine import Engine
from viasd_calib.errors import JobWarning, StorageError
from viasd_calib.slim.offload.layer_files import ALIGNMENT, PAGE, Shape, bytes_of_tensor, places_of, sublayer_file
from viasd_calib.slim.offload.reading import DiskSource, aligned_buffer
from viasd_calib.slim.offload.settings import Offload

pytestmark = pytest.mark.usefixtures("empty_cache")
FILES = 8
SHAPES = {"q": Shape((70, 33), torch.bfloat16), "o": Shape((5, 7), torch.float32)}
shapes = st.dictionaries(
    st.sampled_from("abcde"),
    st.builds(
        Shape,
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    ),
    min_size=1,
)


def tensors(wanted: Mapping[str, Shape]) -> dict[str, Tensor]:
    return {name: torch.randn(one.sizes).to(one.dtype) for name, one in wanted.items()}


def layer_files(cache: Path) -> list[Path]:
    return sorted((cache / "layers").rglob("*.bin"))


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name.endswith(".partial")]


def change(path: Path) -> None:
    """Turn one byte, in place."""
    with path.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 0x55]))


@given(wanted=shapes)
def test_tensors_lie_apart_and_aligned(wanted: dict[str, Shape]) -> None:
    places, length = places_of(wanted)
    buffer = torch.zeros(length, dtype=torch.uint8)
    for number, place in enumerate(places.values()):
        assert place.begin % ALIGNMENT == 0
        place.view(buffer).fill_(number)
    for number, (name, place) in enumerate(places.items()):
        assert place.view(buffer).eq(number).all(), "another tensor lies in this one"
        assert place.view(buffer).shape == wanted[name].sizes
    assert length % PAGE == 0


def test_what_is_read_is_what_was_made(tmp_path: Path) -> None:
    made = tensors(SHAPES)
    file = sublayer_file(tmp_path / "a.bin", SHAPES, lambda: made)
    buffer = aligned_buffer(file.bytes)
    DiskSource([file]).read(0, bytes_of_tensor(buffer))
    for name, place in file.places.items():
        assert torch.equal(place.view(buffer), made[name])
    assert file.path.stat().st_size == file.bytes


@pytest.mark.parametrize("direct", [True, False])
def test_files_are_read_with_and_without_the_cache_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """A file system that has no direct reads is read all the same, and changes are seen there, too."""
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if not direct and flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    made = tensors(SHAPES)
    file = sublayer_file(tmp_path / "a.bin", SHAPES, lambda: made)
    source, buffer = DiskSource([file]), aligned_buffer(file.bytes)
    source.read(0, bytes_of_tensor(buffer))
    assert torch.equal(file.places["q"].view(buffer), made["q"])
    for count in (file.bytes - PAGE, file.bytes - 1, 10, 0):
        os.truncate(file.path, count)
        with pytest.raises(StorageError, match=f"{file.path} was changed while it was in use; run again"):
            source.read(0, bytes_of_tensor(buffer))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 1)


def damage_description(path: Path) -> None:
    path.with_suffix(".json").write_text('{"bytes": 3', encoding="utf-8")


def describe_others(path: Path) -> None:
    """The description of a file of the same length, with its tensors in another order."""
    description = path.with_suffix(".json")
    described = description.read_text(encoding="utf-8")
    assert "q_proj" in described
    description.write_text(described.replace("q_proj", "o_proj_").replace("v_proj", "q_proj"), encoding="utf-8")


@contextmanager
def told(damaged: Path | None) -> Iterator[None]:
    """A warning that names a damaged file, and no other one of files."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", JobWarning)
        yield
    said = [str(one.message) for one in found if "is made anew" in str(one.message)]
    assert said == ([] if damaged is None else [f"{damaged} is not what was written; it is made anew"])


DAMAGE: list[Callable[[Path], None]] = [truncate, change, damage_description, describe_others]
REMOVAL: list[Callable[[Path], None]] = [Path.unlink, lambda path: path.with_suffix(".json").unlink()]


@pytest.mark.parametrize(
    "fault", [*DAMAGE, *REMOVAL], ids=["truncated", "changed", "description", "others", "missing", "no description"]
)
def test_a_damaged_file_is_made_anew(tmp_path: Path, empty_cache: Path, fault: Callable[[Path], None]) -> None:
    """That one alone: the others are not touched."""
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    wanted = logits(engine(spec, Offload()), text(0, 9), 9)
    files = layer_files(empty_cache)
    assert len(files) == FILES
    contents, times = [one.read_bytes() for one in files], [one.stat().st_mtime_ns for one in files]
    fault(files[2])
    with told(files[2] if fault in DAMAGE else None):
        assert torch.equal(logits(engine(spec, Offload()), text(0, 9), 9), wanted)
    assert [one.read_bytes() for one in layer_files(empty_cache)] == contents
    anew = [
        number for number, (one, time) in enumerate(zip(files, times, strict=True)) if one.stat().st_mtime_ns != time
    ]
    assert anew == [2]


def rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("fault", [truncate, rewrite, change], ids=["truncated", "rewritten", "changed"])
@pytest.mark.parametrize("method", ["autoregressive", "three_tier"])
def test_what_changes_while_it_decodes_is_refused(
    tmp_path: Path, empty_cache: Path, fault: Callable[[Path], None], method: str
) -> None:
    """Not one token of wrong weights; an engine that is loaded after it makes the file anew."""
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    read = engine(spec, Offload())
    wanted = texts(read, method, [text(1, 7)])
    file = layer_files(empty_cache)[5]
    before = file.read_bytes()
    fault(file)
    for _ in range(2):
        with pytest.raises(StorageError, match=f"{file} was changed while it was in use; run again to make it anew"):
            texts(read, method, [text(1, 7)])
    with told(file):
        assert texts(engine(spec, Offload()), method, [text(1, 7)]) == wanted
    assert file.read_bytes() == before


def test_what_is_removed_while_it_decodes_is_read_on(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    read = engine(spec, Offload())
    wanted = texts(read, "autoregressive", [text(1, 7)])
    for file in layer_files(empty_cache):
        file.unlink()
    assert texts(read, "autoregressive", [text(1, 7)]) == wanted
    again = engine(spec, Offload())  # makes others beside those that are held open
    assert texts(again, "autoregressive", [text(1, 7)]) == texts(read, "autoregressive", [text(1, 7)]) == wanted


def test_an_error_of_the_disk_is_told_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    read = engine(spec, Offload())
    wanted = texts(read, "autoregressive", [text(1, 7)])

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match=r"cannot read .*layer-.*\.bin: Input/output error; run again"):
            texts(read, "autoregressive", [text(1, 7)])
    assert texts(read, "autoregressive", [text(1, 7)]) == wanted


def test_no_space_leaves_nothing_half_written(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was written before stays, so that a load with more space goes on from there."""
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    write, written = Path.write_bytes, list[Path]()

    def fail(path: Path, data: Any) -> int:
        if "layers" in path.parts and len(written) == 3:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        if "layers" in path.parts:
            written.append(path)
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(StorageError, match=r"cannot write .*\.bin: no space left .*; free some .*, or set HF_HOME"):
            engine(spec, Offload())
    assert len(layer_files(empty_cache)) == 3
    assert not leftovers(empty_cache)
    times = [one.stat().st_mtime_ns for one in layer_files(empty_cache)]
    engine(spec, Offload())
    assert [one.stat().st_mtime_ns for one in layer_files(empty_cache)][:3] == times
    assert len(layer_files(empty_cache)) == FILES


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed and what is free; layers that are there already need none."""
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    engine(spec, Offload())
    kept, lost = layer_files(empty_cache)[3:], layer_files(empty_cache)[:3]
    needed = sum(one.stat().st_size for one in lost)
    for one in lost:
        one.unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    words = (
        f"the verifier's layers take {needed:,} bytes there, and {needed - 1:,} are free; .* set HF_HOME to a folder"
    )
    with pytest.raises(StorageError, match=words):
        engine(spec, Offload())
    assert layer_files(empty_cache) == kept
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    engine(spec, Offload())
    assert len(layer_files(empty_cache)) == FILES


def in_place_of_a_file(cache: Path) -> Path:
    file = layer_files(cache)[2]
    file.unlink()
    file.mkdir()
    return file


def in_place_of_a_description(cache: Path) -> Path:
    file = layer_files(cache)[2].with_suffix(".json")
    file.unlink()
    file.mkdir()
    return file


def in_place_of_a_folder(cache: Path) -> Path:
    folder = cache / "layers"
    shutil.rmtree(folder)
    folder.write_bytes(b"")
    return folder


@pytest.mark.parametrize("put", [in_place_of_a_file, in_place_of_a_description, in_place_of_a_folder])
def test_what_is_in_the_way_is_named(tmp_path: Path, empty_cache: Path, put: Callable[[Path], Path]) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    engine(spec, Offload())
    between = put(empty_cache)
    kind = "a folder" if between.is_dir() else "no folder"
    with pytest.raises(StorageError, match=rf"cannot read .*\.bin: {between} is {kind}; remove that and run again"):
        engine(spec, Offload())


def test_a_cache_that_cannot_be_written_says_what_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match=r"Read-only file system; choose a folder that can be written: HF_HOME"):
        engine(spec, Offload())


def test_the_system_itself_refuses_to_grow_a_file(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with small_disk(20_000), pytest.raises(StorageError, match=r"cannot write .*\.bin"):
            engine(spec, Offload())
    finally:
        signal.signal(signal.SIGXFSZ, ignored)
    assert not leftovers(empty_cache)


CONVERT = """
import os, signal, sys
from pathlib import Path
from viasd_calib import load_engine
from viasd_calib.slim.offload import layer_files
from viasd_calib.slim.offload.settings import Offload

spec, last = Path(sys.argv[1]), int(sys.argv[2])
write, count = layer_files.write_json, 0

def counted(path, model):
    global count
    count += "layers" in path.parts
    if "layers" in path.parts and count == last:  # the file is there, what describes it not yet
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, model)

layer_files.write_json = counted
engine = load_engine(spec, dtype="float32", backend="eager", offload=Offload())
print(engine.decoder("autoregressive").generate([7, 8, 9], max_new_tokens=8).tokens)
"""


def test_a_conversion_that_was_killed_goes_on(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    process = started(CONVERT, spec, 4)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    files = layer_files(empty_cache)
    assert len(files) == 4
    times = [one.stat().st_mtime_ns for one in files[:3]]
    engine(spec, Offload())
    assert [one.stat().st_mtime_ns for one in files[:3]] == times
    assert len(layer_files(empty_cache)) == FILES
    assert not leftovers(empty_cache)


def test_what_was_half_written_is_removed_by_a_later_start(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    engine(spec, Offload())
    folders = [next((empty_cache / name).rglob("*.bin")).parent for name in ("layers", "low-bits")]
    for folder in folders:
        for name in (".layer-000-mlp.bin.killed.partial", ".layer-000-mlp.bin.running.partial"):
            (folder / name).write_bytes(b"half")
        os.utime(folder / ".layer-000-mlp.bin.killed.partial", (1e9, 1e9))
    engine(spec, Offload())
    assert sorted(leftovers(empty_cache)) == sorted(one / ".layer-000-mlp.bin.running.partial" for one in folders)


def test_two_processes_convert_at_once(tmp_path: Path, empty_cache: Path) -> None:
    spec = write_spec(save_verifier(tmp_path / "q"), LOW_BITS)
    processes = [started(CONVERT, spec, -1), started(CONVERT, spec, -1)]
    outputs = [one.communicate(timeout=120) for one in processes]
    assert [one.returncode for one in processes] == [0, 0], outputs
    found: Engine = engine(spec, Offload())
    wanted = [*found.decoder("autoregressive").generate([7, 8, 9], max_new_tokens=8).tokens]
    assert [output for output, _ in outputs] == [f"{wanted}\n"] * 2
    assert len(layer_files(empty_cache)) == len(cold(found).positions) == FILES
    assert not leftovers(empty_cache)
