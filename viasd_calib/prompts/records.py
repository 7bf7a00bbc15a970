"""One prompt's entry in a file each, and where it stands: JSON, JSONL, CSV, TSV and plain text."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

JSON_CELLS = frozenset({"turns", "messages", "conversations", "conversation", "prompt", "chat_template_kwargs"})
"""Columns of a table whose cells may hold JSON."""
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Record:
    """An entry of a file.

    Attributes:
        place: where it stands, as a message names it.
        value: what it holds.
        problem: why it could not be read; empty where it could.
        delimiter: between cells, where it is the row of a table.
    """

    place: str
    value: Any
    problem: str = ""
    delimiter: str = ""


class _Flaw(str):
    """Stands in a parsed value for what JSON does not allow, and says what that is."""


def parse_json(text: str) -> Any:
    """A JSON value, read strictly: no key twice in an object, no NaN, no half characters.

    Raises:
        ValueError: it is not one; the message says where or why.

    Example:
        >>> parse_json('{"turns": ["Why?"], "turns": ["How?"]}')
        Traceback (most recent call last):
        ValueError: the key 'turns' stands twice
    """
    value = _guarded(_DECODER.decode, text)
    flaw = _flaw(value)
    if flaw:
        raise ValueError(flaw)
    return value


def _constant(name: str) -> _Flaw:
    return _Flaw(f"{name} is no JSON; write null or a text")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Flaw:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            return _Flaw(f"the key {key!r} stands twice")
        found[key] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _guarded(parse: Callable[..., Any], *where: Any) -> Any:
    try:
        return parse(*where)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"not JSON that can be read ({error})") from error


def _flaw(value: Any) -> str:
    """What JSON does not allow in a parsed value; empty for nothing."""
    try:
        return _flaw_in(value)
    except RecursionError:
        return "nested too deeply to be read"


def _flaw_in(value: Any) -> str:
    if isinstance(value, _Flaw):
        return str(value)
    if isinstance(value, str):
        half = next((character for character in value if "\ud800" <= character <= "\udfff"), None)
        return "" if half is None else f"half a character, {half!a}, in {value[:20]!a}"
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next(filter(None, map(_flaw_in, inner)), "")


def _record(place: str, value: Any) -> Record:
    problem = _flaw(value)
    return Record(place, None, problem) if problem else Record(place, value)


def json_records(text: str) -> tuple[str, list[Record]]:
    """Entries of JSON text, and what it is: an array, one object a line, or objects one after another."""
    lines = [(number, line.strip(" \t\r\ufeff")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line]
    found = [_line(number, line) for number, line in lines[:1]]
    if not lines or lines[0][1][0] not in "[{" or (found[0].problem == "" and len(lines) > 1):
        return "JSONL", [_line(number, line) for number, line in lines]
    is_array = lines[0][1][0] == "["
    if found[0].problem == "" and not is_array:
        return "JSONL", found
    values = list(_array(text) if is_array else _one_after_another(text, 0))
    if is_array or not any(record.problem for record in values):
        return "JSON", values
    return "JSONL", [_line(number, line) for number, line in lines]


def _line(number: int, line: str) -> Record:
    try:
        return Record(f"line {number}", parse_json(line))
    except ValueError as error:
        return Record(f"line {number}", None, str(error))


def _array(text: str) -> Iterator[Record]:
    yield from _one_after_another(text, text.index("[") + 1, between=",", end="]")


def _one_after_another(text: str, place: int, between: str = "", end: str = "") -> Iterator[Record]:
    """Values of a text from a place on; reading ends at the first that is not JSON."""
    line, counted = 1, 0

    def named(at: int) -> str:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, at), at
        return f"line {line}"

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n\ufeff":
            at += 1
        return at

    place, first = skip(place), True
    while place < len(text):
        if end and text[place] == end:
            rest = skip(place + 1)
            if rest < len(text):
                yield Record(named(rest), None, "something stands after the end of the array")
            return
        if between and not first:
            if text[place] != between:
                yield Record(named(place), None, f"not JSON (no {between!r} between two entries of the array)")
                return
            place = skip(place + 1)
        where = named(place)
        try:
            value, place = _guarded(_DECODER.raw_decode, text, place)
        except ValueError as error:
            yield Record(where, None, str(error))
            return
        yield _record(where, value)
        place, first = skip(place), False
    if end:
        yield Record(named(len(text)), None, "not JSON (the array does not end)")


def table_records(text: str, delimiter: str) -> list[Record]:
    """Entries of a table with a heading: a row each, keys in lower case; empty cells are left out.

    Args:
        delimiter: between cells; empty for whichever of comma, semicolon and tab the heading has most of.
    """
    heading = text.lstrip("\r\n").split("\n", 1)[0]
    chosen = delimiter or max(DELIMITERS, key=heading.count)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        rows = _rows(csv.reader(io.StringIO(text, newline=""), delimiter=chosen, strict=True))
        return [replace(row, delimiter=chosen) for row in rows]
    finally:
        csv.field_size_limit(limit)


def _rows(reader: Any) -> Iterator[Record]:
    keys: list[str] = []
    begin = 1
    try:
        for cells in reader:
            place, begin = f"line {begin}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not keys:
                keys = [cell.strip().lower() for cell in cells]
                double = next((key for key in keys if key and keys.count(key) > 1), None)
                if double is not None:
                    yield Record(place, None, f"two columns are called {double!r}")
                    return
                continue
            if len(cells) > len(keys):
                yield Record(place, None, f"{len(cells)} cells under {len(keys)} headings; quote cells with delimiters")
                continue
            yield Record(place, {key: _cell(key, cell) for key, cell in zip(keys, cells, strict=False) if cell.strip()})
    except csv.Error as error:
        yield Record(f"line {begin}", None, f"not CSV ({error}); double the quotes within a quoted cell")


def _cell(key: str, cell: str) -> Any:
    if key in JSON_CELLS and cell.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):  # a text that merely begins so
            return parse_json(cell)
    return [cell] if key == "turns" else cell


def text_records(text: str) -> list[Record]:
    """Entries of plain text: a line each."""
    lines = enumerate(text.split("\n"), 1)
    return [Record(f"line {number}", {"prompt": line.strip()}) for number, line in lines if line.strip()]
