"""Every format and shape of the files people have: the same prompts, whatever they were written in."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from viasd_calib.errors import PromptError
from viasd_calib.prompts import Prompt, read_prompt_file, read_prompts

ROWS: list[dict[str, Any]] = [
    {"id": "a", "task": "qa", "turns": ["Größe, or what?"]},
    {"id": "b", "task": "coding", "turns": ['Say "hi";\nthen leave.', "And then?"], "reference": "bye"},
]
EXPECTED = [Prompt(**row) for row in ROWS]
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1)
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)


def table(delimiter: str) -> str:
    """The rows as a spreadsheet writes them, a blank row after the heading."""
    target = io.StringIO(newline="")
    writer = csv.writer(target, delimiter=delimiter)
    rows = [[row["id"], row["task"], json.dumps(row["turns"]), row.get("reference", "")] for row in ROWS]
    writer.writerows([["id", "Task", "turns ", "reference"], [], [*rows[0][:2], ROWS[0]["turns"][0], ""], rows[1]])
    return target.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("p.jsonl", JSONL.encode(), "JSONL"),
        ("p.jsonl", JSONL.encode("utf-8-sig"), "JSONL"),
        ("p.jsonl", JSONL.replace("\n", "\n\ufeff").encode("utf-8-sig"), "JSONL"),
        ("p.jsonl", JSONL.encode("utf-16"), "JSONL"),
        ("p.jsonl", b"\xfe\xff" + JSONL.encode("utf-16-be"), "JSONL"),
        ("p.jsonl", JSONL.encode("utf-32"), "JSONL"),
        ("p.jsonl", JSONL.replace("\n", "\r\n").encode(), "JSONL"),
        ("p.jsonl", JSONL.replace("\n", "\r").encode(), "JSON"),
        ("p.jsonl", gzip.compress(JSONL.encode(), mtime=0), "JSONL"),
        ("p.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0), "JSONL"),
        ("p.jsonl.gz", JSONL.encode(), "JSONL"),
        ("p.JSON.GZ", gzip.compress(ARRAY.encode(), mtime=0), "JSON"),
        ("p.json", ARRAY.encode(), "JSON"),
        ("p.json", json.dumps(ROWS).encode(), "JSON"),
        ("p.json", JSONL.encode(), "JSONL"),
        ("p.json", PRETTY.encode(), "JSON"),
        ("prompts", ARRAY.encode(), "JSON"),
        ("p.csv", table(",").encode(), "CSV"),
        ("p.csv", table(";").encode("utf-8-sig"), "CSV"),
        ("p.csv", table("\t").replace("\r", "").encode("utf-16"), "CSV"),
        ("p.csv.gz", gzip.compress(table(",").encode(), mtime=0), "CSV"),
        ("p.tsv", table("\t").encode(), "TSV"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else value,
)
def test_reads_what_it_says(tmp_path: Path, name: str, data: bytes, kind: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    found = read_prompt_file(path)
    assert found.prompts == EXPECTED
    assert found.describe() == [f"read {len(found.prompts)} prompts as {kind} from {path}"]


def test_reads_parquet_whatever_its_name(tmp_path: Path) -> None:
    rows = [{**row, "made": pa.scalar(0, pa.timestamp("s")).as_py(), "reference": None} for row in ROWS]
    for name in ("p.parquet", "p"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        found = read_prompt_file(tmp_path / name)
        assert [one.turns for one in found.prompts] == [one.turns for one in EXPECTED]
        assert found.describe() == [
            f"read 2 prompts as Parquet from {tmp_path / name}",
            "keys of the prompts that are not used, and how many have each: made (2)",
        ]


def test_reads_plain_text_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Why?\n\n  {How?}\r\nWhy?\n")
    found = read_prompt_file(path)
    assert [one.turns for one in found.prompts] == [["Why?"], ["{How?}"], ["Why?"]]
    first = Prompt(id="x", turns=["Why?"]).sha256[:12]
    assert [found.prompts[place].id for place in (0, 2)] == [first, f"{first}-2"]
    assert {one.task for one in found.prompts} == {"default"}
    assert found.describe() == [f"read 3 prompts as plain text from {path}"]


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "OpenAI messages": (
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
        {"turns": ["Why?"], "system": "Be brief."},
    ),
    "OpenAI messages ": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]},
        {"turns": ["Why?"]},
    ),
    "ShareGPT conversations": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"turns": ["Why?"], "reference": "So."},
    ),
    "ShareGPT conversations ": (
        {"conversation": [{"role": "user", "content": "Why?"}]},
        {"turns": ["Why?"]},
    ),
    "prompt/completion": ({"prompt": "Why?", "completion": "So."}, {"turns": ["Why?"], "reference": "So."}),
    "prompt/completion ": (
        {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": "So."}]},
        {"turns": ["Why?"], "reference": "So."},
    ),
    "Alpaca instructions": (
        {"instruction": "Why?", "input": "", "output": "So."},
        {"turns": ["Why?"], "reference": "So."},
    ),
    "Alpaca instructions ": (
        {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "maths"},
        {"turns": ["Add.\n\n1 and 2"], "reference": "3", "task": "maths"},
    ),
    "question/answer": ({"question": "Why?", "answer": "So."}, {"turns": ["Why?"], "reference": "So."}),
    "MT-bench/Spec-Bench": (
        {"question_id": 81, "category": "writing", "turns": ["Why?", "And?"], "reference": ["So."]},
        {"id": "81", "task": "writing", "turns": ["Why?", "And?"], "reference": ["So."]},
    ),
    "": (
        {"id": 7, "task": 3, "turns": ["Why?"], "chat_template_kwargs": {"enable_thinking": False}},
        {"id": "7", "task": "3", "turns": ["Why?"], "chat_template_kwargs": {"enable_thinking": False}},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_recognises_the_usual_shapes(tmp_path: Path, shape: str) -> None:
    entry, expected = SHAPES[shape]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**entry, "author": "me", "nothing": None}))
    found = read_prompt_file(path)
    (prompt,) = found.prompts
    assert prompt == Prompt(**{"id": prompt.sha256[:12], **expected})
    said = f"{shape.strip()} JSONL".strip()
    assert found.describe() == [
        f"read 1 prompt as {said} from {path}",
        "keys of the prompts that are not used, and how many have each: author (1)",
    ]


def test_a_list_within_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for around in ({}, {"version": 2, "license": "none"}):
        path.write_text(json.dumps({**around, "data": [{"prompt": "Why?"}, {"prompt": "How?", "level": 1}]}, indent=1))
        found = read_prompt_file(path)
        assert [one.turns for one in found.prompts] == [["Why?"], ["How?"]]
        read, unused = found.describe()
        assert read == f"read 2 prompts as prompt/completion JSON (the list 'data') from {path}"
        assert all(f"{key} (1)" in unused for key in [*around, "level"])


def test_a_cell_that_merely_begins_as_json_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("turns\n[INST] Why?\n")
    assert [one.turns for one in read_prompt_file(path).prompts] == [["[INST] Why?"]]


def test_says_how_many_have_each_shape_and_each_unused_key(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    said = [{"role": "user", "content": "How?", "name": "me"}]
    rows = [{"turns": ["1"], "category": "x", "task": "y"}, {"prompt": "Why?"}, {"messages": said, "prompt": "How?"}]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "Where?"}]))
    assert read_prompt_file(path).describe() == [
        f"read 4 prompts as JSONL (2 prompt/completion, 1 own, 1 OpenAI messages) from {path}",
        "keys of the prompts that are not used, and how many have each: category (1), name of messages (1), prompt (1)",
    ]


def test_reads_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked: list[tuple[str, str | None, str | None]] = []

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        asked.append((name, config, split))
        whole = datasets.Dataset.from_list([{"question": "Why?", "answer": "So."}])
        splits = {"one": ["train"], "two": ["train", "test"]}[name.rpartition("/")[2]]
        return whole if split else datasets.DatasetDict(dict.fromkeys(splits, whole))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("mine/one", "one", "mine/two:test", "mine/two:main:test"):
        found = read_prompt_file(source)
        assert [(one.turns, one.reference) for one in found.prompts] == [(["Why?"], "So.")]
        assert found.describe() == [f"read 1 prompt as question/answer data set from {source}"]
    assert asked[2:] == [("mine/two", None, "test"), ("mine/two", "main", "test")]
    with pytest.raises(PromptError, match=r"'mine/two' has the splits train, test; say which: mine/two:train"):
        read_prompts("mine/two")


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def dataset_info(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    complaint = r"cannot read prompts from 'mine/one:test'.* \(no route to host\); give the path of a local file"
    with pytest.raises(PromptError, match=complaint) as caught:
        read_prompts("mine/one:test")
    assert "\n" not in str(caught.value)


def test_reading_loads_nothing_heavy(tmp_path: Path) -> None:
    """A bad file is refused before the seconds that torch takes to load."""
    heavy = ("torch", "transformers", "datasets", "pyarrow", "numpy", "lightning")
    path = tmp_path / "p.csv"
    path.write_text("prompt\nWhy?\n")
    program = f"import sys\nfrom viasd_calib.prompts import read_prompts\nread_prompts({str(path)!r})\n"
    program += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
