"""Reading prompts from a file, from a data set of the hub, or from the package itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from viasd_calib.errors import PromptError
from viasd_calib.prompts.problems import as_it_should_be, describe_wrong
from viasd_calib.prompts.records import Record, json_records, table_records, text_records
from viasd_calib.prompts.schema import Prompt
from viasd_calib.prompts.shapes import SHAPES, recognise
from viasd_calib.prompts.stored_tables import HUB_NAME, hub_records, parquet_records
from viasd_calib.prompts.text_files import NOT_GZIP, decode, is_misnamed_gzip, read_bytes

EMBEDDED = "embedded"
"""The name under which the package's own prompts are asked for, in place of a path."""

SHOWN = 3
"""Bad entries that an error names; it counts the others."""
PARQUET = b"PAR1"
PLAIN_TEXT = "plain text"
JSON_NAMES = ("jsonl", "ndjson", "json")
TEXT_NAMES = ("txt", "text")
TABLES: dict[str, tuple[str, Callable[[str], list[Record]]]] = {
    "csv": ("CSV", partial(table_records, delimiter="")),
    "tsv": ("TSV", partial(table_records, delimiter="\t")),
}
KNOWN = (*JSON_NAMES, *TABLES, *TEXT_NAMES, "parquet")


@dataclass(frozen=True)
class PromptFile:
    """What was read, and as what.

    Attributes:
        name: of the source, as the user knows it.
        format: of the file, as ``JSONL``.
        shapes: how many entries had which of the known shapes; an empty name is the project's own.
        unused: keys of entries that say nothing to us, and in how many entries each stands.
    """

    name: str
    format: str
    shapes: Counter[str]
    unused: Counter[str]
    prompts: list[Prompt]

    def describe(self) -> list[str]:
        """What a user should know of it: a line on what was read, and one on what was not."""
        shapes = [f"{shape} {self.format}".strip() for shape, _ in self.shapes.most_common()]
        if len(shapes) > 1:
            shapes = [f"{count} {shape or 'own'}" for shape, count in self.shapes.most_common()]
            shapes = [f"{self.format} ({', '.join(shapes)})"]
        count = len(self.prompts)
        lines = [f"read {count} prompt{'s' if count > 1 else ''} as {shapes[0]} from {self.name}"]
        if self.unused:
            keys = ", ".join(f"{key} ({count})" for key, count in sorted(self.unused.items()))
            lines.append(f"keys of the prompts that are not used, and how many have each: {keys}")
        return lines


def read_prompts(source: str | Path) -> list[Prompt]:
    """The prompts of :func:`read_prompt_file`."""
    return read_prompt_file(source).prompts


def read_prompt_file(source: str | Path) -> PromptFile:
    """Read prompts, from entries of any of the known shapes.

    Args:
        source: a file of JSONL, JSON (an array, or an object with one), CSV or TSV (with a heading), plain text (a
            prompt a line), each also compressed with gzip, or Parquet; ``"embedded"`` for the package's own prompts; or
            a data set of the hub, as ``NAME``, ``NAME:SPLIT`` or ``NAME:CONFIGURATION:SPLIT``.

    Raises:
        PromptError: no such file, no prompt in it, or entries that are no prompts: the first few are named with their
            lines, all that is wrong with each, and how it should be.
    """
    name, kind, records = _read_records(source)
    kind, records, around = _unwrapped(kind, records)
    if not records:
        usual = "write one JSON object a line with id, task, turns and reference"
        raise PromptError(f"{name}: no prompts; {NOT_GZIP if is_misnamed_gzip(source) else usual}")
    read: list[_Read] = []
    bad: list[tuple[str, str]] = []
    for record in records:
        try:
            read.append(_read(record))
        except PromptError as error:
            bad.append((record.place, str(error)))
    if bad:
        problem = _all_bad(name, bad, len(records))
        raise PromptError(f"{problem}; {NOT_GZIP}" if not read and is_misnamed_gzip(source) else problem)
    _refuse_doubles(name, read)
    shapes = Counter("" if kind == PLAIN_TEXT else one.shape for one in read)
    unused = Counter([*around, *(key for one in read for key in one.unused)])
    return PromptFile(name, kind, shapes, unused, _with_ids(read))


def _unwrapped(kind: str, records: list[Record]) -> tuple[str, list[Record], list[str]]:
    """The entries of a file that holds one object with a list of them, and the other keys of that object.

    Everything stays as it is where the object is a prompt itself, or has several lists.
    """
    whole = records[0].value if len(records) == 1 else None
    if not isinstance(whole, dict) or recognise(whole) is not None:
        return kind, records, []
    lists = [key for key, value in whole.items() if _is_entries(value)]
    if len(lists) != 1:
        return kind, records, []
    (key,) = lists
    entries = [Record(f"entry {number} of {key!r}", entry) for number, entry in enumerate(whole[key], 1)]
    return f"JSON (the list {key!r})", entries, [other for other in whole if other != key]


def _is_entries(value: Any) -> bool:
    """Whether a value is a list of objects, as a file's entries are."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


@dataclass(frozen=True)
class _Read:
    """An entry that is a prompt; whether it has an id of its own, or it is made later."""

    place: str
    prompt: Prompt
    shape: str
    unused: list[str]
    has_id: bool


def _read(record: Record) -> _Read:
    """An entry as a prompt.

    Raises:
        PromptError: saying all that is wrong with it, and how it should be; where it stands is left to the caller.
    """
    usual = as_it_should_be({}, set(), record.delimiter)
    if record.problem:
        raise PromptError(f"{record.problem}; {usual}")
    if not isinstance(record.value, dict):
        raise PromptError(f"not a JSON object; {usual}")
    found = recognise(record.value)
    if found is None:
        keys = ", ".join(str(key) for key in record.value) or "none"
        known = ", ".join(dict.fromkeys(shape.key for shape in SHAPES))
        for key, value in record.value.items():
            if _is_entries(value):
                mend = f"{key!r} holds a list: give its entries alone, as a JSON array or one a line"
                raise PromptError(f"none of its keys ({keys}) holds a prompt, but {mend}; {usual}")
            if isinstance(value, list) and value and isinstance(value[0], str):
                mend = f"{key!r} holds a list of texts: write them one a line into a .txt file"
                raise PromptError(f"none of its keys ({keys}) holds a prompt, but {mend}; {usual}")
        raise PromptError(f"none of its keys ({keys}) holds a prompt: give turns (or one of {known}); {usual}")
    try:
        prompt = Prompt.model_validate({"id": "made later", **found.fields})
    except ValidationError as error:
        raise PromptError(describe_wrong(error, found.fields, record.delimiter)) from error
    return _Read(record.place, prompt, found.shape, found.unused, "id" in found.fields)


def _all_bad(name: str, bad: Sequence[tuple[str, str]], entries: int) -> str:
    """What is wrong with the first entries, and how many others are wrong too."""
    if len(bad) == 1:
        place, problem = bad[0]
        return f"{name}, {place}: {problem}"
    lines = [f"{name}, {place}: {problem}" for place, problem in bad[:SHOWN]]
    more = f", the first {SHOWN} of them" if len(bad) > SHOWN else ""
    return "\n  ".join([f"{len(bad)} of {entries} entries of {name} are no prompts{more}:", *lines])


def _refuse_doubles(name: str, read: Sequence[_Read]) -> None:
    places: dict[str, list[str]] = {}
    for one in read:
        if one.has_id:
            places.setdefault(one.prompt.id, []).append(one.place)
    doubled = {id_: found for id_, found in places.items() if len(found) > 1}
    if not doubled:
        return
    shown = [f"{' and '.join(found[:2])} share the id {id_!r}" for id_, found in list(doubled.items())[:SHOWN]]
    more = f"; so do others, {len(doubled)} ids in all" if len(doubled) > SHOWN else ""
    raise PromptError(f"{name}: {'; '.join(shown)}{more}; give each its own, or leave out all ids")


def _with_ids(read: Sequence[_Read]) -> list[Prompt]:
    """Prompts without an id get the beginning of their hash; the same text again, a number after it."""
    taken = {one.prompt.id for one in read if one.has_id}
    named: list[Prompt] = []
    for one in read:
        if one.has_id:
            named.append(one.prompt)
            continue
        first = one.prompt.sha256[:12]
        made = next(name for name in chain([first], (f"{first}-{n}" for n in count(2))) if name not in taken)
        taken.add(made)
        named.append(one.prompt.model_copy(update={"id": made}))
    return named


def _read_records(source: str | Path) -> tuple[str, str, list[Record]]:
    """What the source is called, its format, and its entries."""
    if source == EMBEDDED:
        text = resources.files("viasd_calib").joinpath("data/prompts.jsonl").read_text("utf-8")
        return "the package", *json_records(text)
    path = Path(source)
    ending = _ending(path)
    if isinstance(source, str) and HUB_NAME.fullmatch(source) and ending not in KNOWN and not path.exists():
        return source, "data set", hub_records(source)
    data = read_bytes(path)
    if data.startswith(PARQUET):
        return str(path), "Parquet", parquet_records(path)
    if ending == "parquet":
        raise PromptError(
            f"{path}: not a Parquet file, though its name ends in .parquet: write it again, or give it the ending of "
            "what it holds, as .jsonl or .csv"
        )
    try:
        text = decode(str(path), data)
    except PromptError as error:
        raise PromptError(f"{path}: no text, and {NOT_GZIP}" if is_misnamed_gzip(path) else str(error)) from error
    if ending in TABLES:
        kind, read = TABLES[ending]
        return str(path), kind, read(text)
    if ending in JSON_NAMES or (ending not in KNOWN and text.lstrip()[:1] in ("{", "[")):
        return str(path), *json_records(text)
    if ending in TEXT_NAMES:
        return str(path), PLAIN_TEXT, text_records(text)
    if not text.strip():
        return str(path), "", []
    raise PromptError(
        f"{path}: its name does not say what it holds; call it .jsonl, .json, .csv, .tsv or .txt (a prompt a line), "
        "also with .gz after, or .parquet"
    )


def _ending(path: Path) -> str:
    """The last part of a file's name in small letters; ``gz`` does not count."""
    parts = path.name.lower().split(".")[1:]
    if parts[-1:] == ["gz"]:
        parts.pop()
    return parts[-1] if parts else ""
