"""Logs: lines are whole, whoever is killed and whoever else writes; what is not is named."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.logs import logged
from viasd_calib.calibration.text_log import LoggedText, append_text, read_log
from viasd_calib.errors import CalibrationError, StorageError


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path, texts = tmp_path / "logs" / "log.jsonl", [logged(1), logged(2, 3), logged(3, audit="strict")]
    for text in texts:
        append_text(path, text)
    found = read_log(path)
    assert found.texts == [*enumerate(texts, 1)]
    assert found.unfinished is None
    assert found.place(2) == f"{path}, line 2"


def test_a_line_that_was_cut_anywhere_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path, texts = tmp_path / "log.jsonl", [logged(number, 1) for number in range(3)]
    for text in texts:
        append_text(path, text)
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        found = read_log(path)
        assert [text for _, text in found.texts] == texts[:2]
        assert found.unfinished == (3 if end > begin else None)  # a line without its end may lack a digit


def test_who_appends_removes_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for before, cut in ((2, 30), (0, 30), (2, 1)):
        path.unlink(missing_ok=True)
        for number in range(before + 1):
            append_text(path, logged(number))
        path.write_bytes(path.read_bytes()[:-cut])
        append_text(path, logged(9))
        found = read_log(path)
        assert [text.prompt for _, text in found.texts] == [f"{number:016x}" for number in (*range(before), 9)]
        assert found.unfinished is None


def test_a_long_unfinished_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_text(path, logged(0))
    with path.open("ab") as file:
        file.write(b"x" * 200_000)
    append_text(path, logged(1))
    assert len(read_log(path).texts) == 2


def append_many(path: Path, first: int) -> None:
    for number in range(first, first + 40):
        append_text(path, logged(number, 200, 400))


def test_processes_that_append_to_one_file_cut_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(path, 100 * number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({text.prompt for _, text in read_log(path).texts}) == 120


@pytest.mark.parametrize("line", [b"{}", b"", b"[1]", b"\xff", b'{"policy": "a"}'])
def test_a_damaged_line_is_refused_by_its_number(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_text(path, logged(0))
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(CalibrationError, match=r"log\.jsonl, line 2 is no text of a log .*; remove that line, or give"):
        read_log(path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokens": 11}, "11 tokens and 2 departures, and those of its turns sum to 10 and 2"),
        ({"value": 1.5}, "less than or equal to 1"),
        ({"version": 2}, "Input should be 1"),
        ({"other": 2}, "Extra inputs"),
        ({"turns": []}, "at least 1 item"),
        (
            {"turns": [{"tokens": 10, "pending": [0, 10], "departed": [], "deficits": []}]},
            "no.* rising places among 10",
        ),
        ({"turns": [{"tokens": 10, "pending": [0], "departed": [1], "deficits": [0.1]}]}, "among the pending ones"),
        ({"turns": [{"tokens": 10, "pending": [0], "departed": [0], "deficits": []}]}, "1 departed tokens and 0 def"),
    ],
)
def test_a_text_that_contradicts_itself_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        LoggedText.model_validate_json(json.dumps({**logged(1, 2).model_dump(mode="json"), **changes}))


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.jsonl is missing; viasd generate --log writes one"):
        read_log(tmp_path / "none.jsonl")
    with pytest.raises(CalibrationError, match="Is a directory; give the path of a log"):
        read_log(tmp_path)
    with pytest.raises(StorageError, match="Is a directory"):
        append_text(tmp_path, logged(0))
