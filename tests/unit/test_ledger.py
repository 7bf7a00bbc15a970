"""A job that is killed at any byte goes on with the steps that it had finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import small_disk
from viasd_calib.errors import StorageError
from viasd_calib.ledger import Ledger, ledger_beside

JOB = {"prompts": "abc"}


@dataclass(frozen=True)
class Pair:
    """Something that a step comes to."""

    name: str
    numbers: list[float]


def never() -> Pair:
    """What must not be computed."""
    raise AssertionError("computed again")


def run(path: Path, names: list[str]) -> int:
    """A job of a step for each name; how many of them it computed."""
    computed = 0
    ledger = Ledger(path, JOB)
    for place, name in enumerate(names):

        def compute(name: str = name, place: int = place) -> Pair:
            nonlocal computed
            computed += 1
            return Pair(name, [place / 3])

        assert ledger.recall(f"step {place}", Pair, compute) == Pair(name, [place / 3])
    return computed


def test_a_step_that_is_noted_is_not_computed_again(tmp_path: Path) -> None:
    assert run(tmp_path / "x.steps", ["a", "b"]) == 2
    ledger = Ledger(tmp_path / "x.steps", JOB)
    assert ledger.steps_done == 2
    assert ledger.recall("step 1", Pair, never) == Pair("b", [1 / 3])


@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=5),
    cut=st.integers(min_value=0),
)
def test_a_file_that_was_cut_anywhere_loses_no_whole_line(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.steps"
    run(path, names)
    whole = path.read_bytes()
    left = whole[: cut % (len(whole) + 1)]
    path.write_bytes(left)
    entries = max(0, left.count(b"\n") - 1)  # after the heading
    assert run(path, names) == len(names) - entries
    assert run(path, names) == 0


def test_a_job_with_other_options_begins_anew(tmp_path: Path) -> None:
    run(tmp_path / "x.steps", ["a"])
    assert Ledger(tmp_path / "x.steps", {"prompts": "other"}).steps_done == 0
    assert Ledger(tmp_path / "x.steps", JOB).steps_done == 0


def test_a_line_that_is_no_entry_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.steps"
    run(path, ["a", "b"])
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], "{}", lines[2], ""]), encoding="utf-8")
    assert Ledger(path, JOB).steps_done == 1


def test_another_version_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "x.steps", ["a"])
    monkeypatch.setattr("viasd_calib.ledger.__version__", "0.0.1")
    assert Ledger(tmp_path / "x.steps", JOB).steps_done == 0


def test_what_is_no_longer_read_is_done_again(tmp_path: Path) -> None:
    run(tmp_path / "x.steps", ["a"])
    for _ in range(2):
        assert Ledger(tmp_path / "x.steps", JOB).recall("step 0", list[int], lambda: [1, 2]) == [1, 2]


def test_it_lies_beside_the_result_until_that_is_written(tmp_path: Path) -> None:
    ledger = ledger_beside(tmp_path / "bench.json", JOB)
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json.steps"]
    ledger.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_nothing_is_kept() -> None:
    ledger = Ledger()
    assert ledger.recall("one", int, lambda: 1) == 1
    assert ledger.recall("one", int, lambda: 2) == 2
    ledger.close()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.steps", JOB)
    with small_disk(100), pytest.raises(StorageError, match=r"x\.steps"):
        ledger.recall("one", str, lambda: "x" * 10_000)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.steps").mkdir()
    with pytest.raises(StorageError, match=r"x\.steps.*remove it"):
        Ledger(tmp_path / "x.steps", JOB)


def test_kill_9_loses_the_step_that_was_running_alone(tmp_path: Path) -> None:
    job = f"""
import os, signal
from pathlib import Path
from viasd_calib.ledger import Ledger
ledger = Ledger(Path({str(tmp_path / "x.steps")!r}), {JOB!r})
ledger.recall("first", int, lambda: 1)
ledger.recall("second", int, lambda: os.kill(os.getpid(), {int(signal.SIGKILL)}))
"""
    killed = subprocess.run([sys.executable, "-c", job], env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Ledger(tmp_path / "x.steps", JOB).steps_done == 1
