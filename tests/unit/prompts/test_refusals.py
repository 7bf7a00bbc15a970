"""Bad prompt files: all that is wrong is said at once, with the line and how it should be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from viasd_calib.errors import PromptError
from viasd_calib.prompts import read_prompts

GOOD = json.dumps({"id": "a", "task": "qa", "turns": ["Why?"]})


def said(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "w"} for role in roles]}


LINES: list[tuple[Any, list[str]]] = [
    ({"id": True, "task": ["qa"], "turns": "Why?"}, [
        "id is true, not a text", "task is a list, not a text", 'turns is the text "Why?", not a list',
        'it should be as {"turns": ["Why?"], "id": "mine/1", "task": "qa"}',
    ]),
    ({"turns": [""]}, ["turns.0 is blank"]),
    ({"turns": ["Why?", "\t"]}, ["turns.1 is blank", '{"turns": ["Why?", "Why is the sky blue?"]}']),
    ({"turns": [None, 3]}, ["turns.0 is null, not a text", "turns.1 is 3, not a text"]),
    ({"turns": ["a\0"]}, ["turns.0 holds a NUL character"]),
    ({"turns": ["Why?"], "system": 3, "chat_template_kwargs": []}, [
        "system is 3, not a text", "chat_template_kwargs is a list, not an object", '"system": "Be brief."',
    ]),
    ({"turns": ["Why?"], "chat_template_kwargs": {"tokenize": False}}, ["hold tokenize, which the decoder decides"]),
    ({"messages": "Why?"}, ['messages is the text "Why?", not a list']),
    ({"messages": []}, ["messages do not end with", '"content": "Why is the sky blue?"}]}']),
    (said("user", "assistant", "tool"), ['messages.2.role is the text "tool", not system, user or assistant']),
    (said("assistant"), ["messages do not end with a user's turn, or with the assistant's answer to it"]),
    (said("system", "assistant"), ["messages do not end with a user's turn"]),
    ({**said("system", "user"), "system": "Be brief."}, ["a system message beside the key system; keep one"]),
    ({**said("user"), "turns": ["Why?"]}, ["put it into turns"]),
    ({"messages": [{"role": "user"}]}, ["messages.0.content is missing"]),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["messages.0.content is a list"]),
    ({"messages": ["Why?"]}, ["messages.0 is the text", "not an object with role and content"]),
    ({"conversations": [{"from": "alien", "value": "w"}]}, ['messages.0.role is the text "alien"']),
    ({"prompt": 3}, ["turns.0 is 3, not a text", '{"turns": ["3"]}']),
    ({"instruction": " ", "output": "So."}, ["turns.0"]),
    ({"question": ""}, ["turns.0 is blank"]),
    ({"text": "Why?", "label": 1}, ["none of its keys (text, label) holds a prompt", "instruction, prompt, question"]),
    ({}, ["none of its keys (none) holds a prompt"]),
    ("null", ["not a JSON object"]),
    ('["Why?"]', ["not a JSON object"]),
    ("{'turns': ['Why?']}", ["not JSON (Expecting property name enclosed in double quotes, column 2)"]),
    ('{"turns": ["Why?"],}', ["not JSON ("]),
    ('{"turns": ["Why?"]', ["not JSON ("]),
    (f"{GOOD} {GOOD}", ["not JSON (Extra data"]),
    ("Why is the sky blue?", ["not JSON (Expecting value, column 1)"]),
    ('{"turns": ["Why?"], "turns": ["How?"]}', ["the key 'turns' stands twice"]),
    ('{"turns": ["Why?"], "reference": {"a": [1, NaN]}}', ["NaN is no JSON"]),
    ('{"turns": ["Why?"], "reference": -Infinity}', ["-Infinity is no JSON"]),
    ('{"turns": ["half \\ud83d"]}', [r"half a character, '\ud83d'"]),
    ('{"turns": ["Why?"], "reference": ' + "[" * 100_000, ["nested too deeply"]),
    ('{"turns": ["Why?"], "reference": ' + "9" * 5000 + "}", ["not JSON that can be read"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "complaints"), LINES, ids=range(len(LINES)))
def test_a_bad_line_is_refused_with_all_that_is_wrong(tmp_path: Path, line: Any, complaints: list[str]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([GOOD, "", line if isinstance(line, str) else json.dumps(line)]) + "\n")
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ")
    assert "; it should be as {" in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 500
    for complaint in complaints:
        assert complaint in message


def test_a_line_as_it_should_be_is_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    for line, _ in LINES:
        path.write_text(f"{GOOD}\n{line if isinstance(line, str) else json.dumps(line)}")
        with pytest.raises(PromptError) as caught:
            read_prompts(path)
        mended = str(caught.value).rpartition("; it should be as ")[2]
        path.write_text(mended)
        assert read_prompts(path), mended


def test_the_first_bad_lines_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([GOOD, "{", "[]", '{"turns": [""]}', '{"turns": []}', '{"turns": ["ok"]}']))
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    first, *lines = str(caught.value).split("\n")
    assert first == f"4 of 6 entries of {path} are no prompts, the first 3 of them:"
    assert [line.split(": ")[0] for line in lines] == [f"  {path}, line {number}" for number in (2, 3, 4)]


FILES: dict[str, tuple[str, bytes, str]] = {
    "Latin-1": ("p.jsonl", f"{GOOD}\n".encode() + "Größe".encode("latin-1"), r"not UTF-8 text \(line 2, byte \d+\)"),
    "half of UTF-16": ("p.jsonl", GOOD.encode("utf-16")[:-1], "not UTF-16 text"),
    "UTF-16 without a mark": ("p.jsonl", GOOD.encode("utf-16-le"), "NUL bytes from line 1 on"),
    "binary": ("p.txt", b"Why?\n\0\0\1", "NUL bytes from line 2 on"),
    "a cut gzip file": ("p.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], "a damaged gzip file"),
    "a gzip file of nothing": ("p.jsonl.gz", gzip.compress(b"", mtime=0), "no prompts"),
    "Excel": ("p.xlsx", b"PK\x03\x04rest", "an Excel file; .*as CSV"),
    "zstd": ("p.jsonl.zst", b"\x28\xb5\x2f\xfdrest", "compressed with zstd; unpack it"),
    "a cut Parquet file": ("p.parquet", b"PAR1rest", "a damaged Parquet file"),
    "no Parquet file": ("p.parquet", GOOD.encode(), r"not a Parquet file, though its name ends in \.parquet: write it"),
    "nothing for Parquet": ("p.parquet", b"", "not a Parquet file"),
    "a page for a gzip file": ("p.jsonl.gz", b"<html>", r"line 1: not JSON .*; it is not compressed with gzip, though"),
    "bytes for a gzip file": ("p.jsonl.gz", b"\0\1\2", r"no text, and it is not compressed .* ends in \.gz: copy or"),
    "nothing for a gzip file": ("p.jsonl.gz", b"", "no prompts; it is not compressed with gzip"),
    "an object with two lists": (
        "p.json", b'{"train": [{"prompt": "Why?"}], "test": [{"prompt": "How?"}]}',
        r"none of its keys \(train, test\) holds a prompt, but 'train' holds a list: give its entries alone, as a JSON",
    ),
    "an object with texts": (
        "p.json", b'{"prompts": ["Why?"]}', "but 'prompts' holds a list of texts: write them one a line into a",
    ),
    "a bad entry of a list in an object": (
        "p.json", b'{"data": [{"prompt": "Why?"}, {"prompt": 3}]}', "entry 2 of 'data': turns.0 is 3, not a text",
    ),
    "an unknown ending": ("p.dat", b"Why?", r"its name does not say what it holds; call it \.jsonl"),
    "nothing": ("p.dat", b"\n \n", "no prompts"),
    "an empty array": ("p.json", b" [ ] ", "no prompts"),
    "an array with a bad entry": ("p.json", b'[\n{"turns": ["Why?"]},\n\n{"turns": 3}]', "line 4: turns is 3"),
    "an array cut short": ("p.json", b'[\n{"turns": ["Why?"]},\n{"turns": ', r"line 3: not JSON"),
    "an array without its end": ("p.json", b'[{"turns": ["Why?"]}\n', "line 2: .*the array does not end"),
    "an array without commas": ("p.json", b'[{"turns": ["Why?"]}\n{"turns": ["How?"]}]', "line 2: .*no ',' between"),
    "an array and more": ("p.json", b'[\n{"turns": ["Why?"]}\n]\n3', "line 4: something stands after the end"),
    "a heading alone": ("p.csv", b"prompt,answer\n", "no prompts"),
    "no heading": ("p.csv", b"Why?,So.\nHow?,Thus.\n", r"line 2: none of its keys \(why\?, so\.\) holds a prompt"),
    "too many cells": ("p.csv", b"prompt,answer\nWhy?,So.\nHow, then?,Thus.\n", "line 3: 3 cells under 2 headings"),
    "a quote left open": ("p.csv", b'prompt\nWhy?\n"How?\n', "line 3: not CSV"),
    "two columns of one name": ("p.csv", b"prompt,Prompt\nWhy?,How?\n", "line 1: two columns are called 'prompt'"),
    "a row after cells of lines": ("p.csv", b'prompt,turns\n"Why\n?",\n,[]\n', "line 4: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_refused(tmp_path: Path, kind: str) -> None:
    name, data, complaint = FILES[kind]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(PromptError, match=complaint) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


ROWS = {
    "a heading of others": ("p.csv", "nr,text\n1,Why?\n", "mine/1,qa,Why is the sky blue? under the heading id,"),
    "semicolons": ("p.csv", 'id;turns\n"a;b";"[""x"", 3]"\n', '"[""x"", ""3""]";"a;b" under the heading turns;id'),
    "tabs": ("p.tsv", "id\tturns\na\t[1]\n", "1\ta under the heading turns\tid"),
    "cells of lines": ("p.csv", 'turns,system\n"[""x"", 3]","Be\nbrief."\n', '"[""x"", ""3""]",Be brief. under'),
    "a conversation": ("p.csv", 'messages\n"[{""role"": ""user""}]"\n', '"[{""role"": ""user"", ""content"": ""Why'),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_mended_as_a_row(tmp_path: Path, kind: str) -> None:
    name, text, mended = ROWS[kind]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    assert f"; it should be as {mended}" in str(caught.value)
    assert "\n" not in str(caught.value)
    row, heading = str(caught.value).rpartition("; it should be as ")[2].split(" under the heading ")
    path.write_text(f"{heading}\n{row}\n")
    assert read_prompts(path)


def test_doubled_ids_are_named_together(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"id": id_, "turns": [str(n)]}) for n, id_ in enumerate([1, "1", "b", "b"])))
    with pytest.raises(PromptError, match="line 1 and line 2 share the id '1'; line 3 and line 4 share the id 'b'"):
        read_prompts(path)
