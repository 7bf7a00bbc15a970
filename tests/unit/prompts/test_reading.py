from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from viasd_calib.errors import PromptError
from viasd_calib.prompts import (
    EMBEDDED,
    Split,
    SplitShares,
    read_prompts,
    select_split,
    split_sha256,
)

GOOD = {"id": "a", "task": "qa", "turns": ["Why?"], "reference": None}
SPLITS: tuple[Split, ...] = get_args(Split)


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_reads_prompts_in_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl", GOOD, "", {**GOOD, "id": "b", "turns": ["1", "2"], "reference": ["x", "y"]}
    )
    first, second = read_prompts(path)
    assert (first.id, second.id) == ("a", "b")
    assert second.turns == ["1", "2"]
    assert second.reference == ["x", "y"]
    assert [p.id for p in read_prompts(str(path))] == ["a", "b"]


@pytest.mark.parametrize("reference", [None, "r", ["r"], [["r", "s"], ["t"]], {"answer": 3}])
def test_a_reference_may_be_any_json(tmp_path: Path, reference: object) -> None:
    (prompt,) = read_prompts(write_lines(tmp_path / "p.jsonl", {**GOOD, "reference": reference}))
    assert prompt.reference == reference


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "JSON"),
        ("[1, 2]", "line 3"),
        ("null", "line 3"),
        ('{"id": "b", "task": "qa"}', "turns"),
        ('{"id": "b", "task": "qa", "turns": []}', "turns"),
        ('{"id": "b", "task": "qa", "turns": "Why?"}', "turns"),
        ('{"id": "b", "task": "qa", "turns": [3]}', r"turns\.0"),
        ('{"id": "", "task": "qa", "turns": ["Why?"]}', "id"),
        ('{"id": "b", "task": "", "turns": ["Why?"]}', "task"),
    ],
)
def test_names_the_line_that_is_malformed(tmp_path: Path, line: str, complaint: str) -> None:
    path = write_lines(tmp_path / "mine.jsonl", GOOD, "", line)
    with pytest.raises(PromptError, match=r"mine\.jsonl, line 3") as caught:
        read_prompts(path)
    with pytest.raises(PromptError, match=complaint):
        read_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, mark: str) -> None:
    """JSON allows these characters within a string; Python's splitlines would cut there."""
    if mark < " ":
        mark_in_json = json.dumps(mark)[1:-1]
        text = json.dumps(GOOD).replace("Why?", f"one{mark_in_json}two")
    else:
        text = json.dumps(GOOD).replace("Why?", f"one{mark}two")
    path = write_lines(tmp_path / "p.jsonl", text, "{")
    with pytest.raises(PromptError, match="line 2"):
        read_prompts(path)
    assert read_prompts(write_lines(tmp_path / "q.jsonl", text))[0].turns == [f"one{mark}two"]


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps({**GOOD, "id": name}).encode() for name in "ab") + b"\r\n")
    assert [p.id for p in read_prompts(path)] == ["a", "b"]


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_refuses_a_file_without_prompts(tmp_path: Path, text: str) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=r"none\.jsonl: no prompts"):
        read_prompts(path)


def test_refuses_a_doubled_id(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", GOOD, {**GOOD, "id": "b"}, {**GOOD, "turns": ["Other?"]})
    with pytest.raises(PromptError, match="line 1 and line 3 share the id 'a'"):
        read_prompts(path)


def test_refuses_what_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).replace("Why", "Größe").encode("latin-1"))
    with pytest.raises(PromptError, match=r"latin\.jsonl: not UTF-8"):
        read_prompts(path)
    path.write_bytes(json.dumps({**GOOD, "turns": ["Größe"]}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(PromptError, match=r"latin\.jsonl: not UTF-8"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_names_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(PromptError, match=r"cannot read prompts from .*check the path"):
        read_prompts(tmp_path / name)


def test_embedded_prompts() -> None:
    prompts = read_prompts(EMBEDDED)
    assert len(prompts) >= 200
    tasks = Counter(prompt.task for prompt in prompts)
    assert len(tasks) == 5
    assert min(tasks.values()) >= 20
    assert len({prompt.sha256 for prompt in prompts}) == len(prompts)
    assert all(turn.strip() for prompt in prompts for turn in prompt.turns)


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_of_the_embedded_prompts_has_every_task(split: Split) -> None:
    chosen = select_split(read_prompts(EMBEDDED), split, SplitShares())
    assert len({prompt.task for prompt in chosen}) == 5


def test_the_embedded_prompts_keep_their_hashes() -> None:
    """Shipped specs name them."""
    assert split_sha256(read_prompts(EMBEDDED)) == "62b3093c4f8ce80af35848c6b33e2eb5f3e9f444c00ca8e5ed02b262ade08c7b"
