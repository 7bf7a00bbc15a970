"""A trace folder: what it was made with, what is asked, and the texts in its shards.

``capture.json`` names every prompt that is asked, by hash. Shards are written whole or not at all, hold every text of
their prompts, and are named after these. So a run that was killed goes on with the prompts that no shard holds; after a
change of the prompts those that are new are captured, and readers leave out those that are no longer asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field

from viasd_calib.draft.places import same_draft
from viasd_calib.errors import TraceError
from viasd_calib.file_names import MANIFEST
from viasd_calib.files import atomic_path, write_json
from viasd_calib.spec import VerifierRef
from viasd_calib.traces.schema import trace_features

SHARDS = "shard-*.parquet"
KEY_COLUMNS = ("prompt_sha256", "turn", "prompt_tokens")


class CaptureSettings(BaseModel):
    """What decides the content of a trace folder; the batch size decides it up to rounding alone.

    Attributes:
        draft_length: drafts are logged as they stand in blocks of 1 to so many drafted tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(128, ge=1)
    batch_size: int = Field(32, ge=1)
    top_k: int = Field(16, ge=2, le=256)
    temperature: float = Field(0.0, ge=0)
    sampling_top_k: int = Field(50, ge=1)
    draft_length: int = Field(6, ge=1, le=64)
    seed: int = 0


class AskedText(BaseModel):
    """What is asked: all turns of a prompt, or one text of given token ids.

    Attributes:
        prompt_sha256: of the prompt.
        text_sha256: of prompt, turn and the ids that are answered; None for all turns of the prompt, whatever they
            come to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_id: str
    prompt_sha256: str
    task: str
    text_sha256: str | None = None

    @property
    def key(self) -> str:
        """What its answers are found by."""
        return self.text_sha256 or self.prompt_sha256


class Manifest(BaseModel):
    """Identity of a trace folder.

    Attributes:
        draft: the drafter's name; a relative path leads there from the folder.
        policy: name of what decoded the texts; None where q wrote them.
        asked: in the order in which texts are read; None in folders of earlier releases, which are read whole.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verifier: VerifierRef
    draft: str
    settings: CaptureSettings
    prompts_sha256: str
    n_prompts: int
    policy: str | None = None
    asked: list[AskedText] | None = None

    @property
    def by_tokens(self) -> bool:
        """Whether texts are found by the ids that they answer."""
        return any(one.text_sha256 is not None for one in self.asked or ())


def text_sha256(prompt_sha256: str, turn: int, ids: Sequence[int]) -> str:
    """Hash of what one text answers.

    Args:
        ids: of the prompt up to that turn.
    """
    return hashlib.sha256(f"{prompt_sha256} {turn} {list(ids)}".encode()).hexdigest()


def shard_name(keys: Iterable[str]) -> str:
    """File name of the shard that holds the texts of these keys.

    Example:
        >>> shard_name(["a", "b"]) == shard_name(["b", "a"])
        True
    """
    return f"shard-{hashlib.sha256(' '.join(sorted(keys)).encode()).hexdigest()[:16]}.parquet"


def open_folder(folder: Path, manifest: Manifest) -> None:
    """Make a folder one of what is asked now; answers that it holds are kept.

    Raises:
        TraceError: its texts were made with another verifier, draft model, policy or other settings.
        StorageError: it cannot be written.
    """
    path = folder / MANIFEST
    if path.is_file():
        found = read_manifest(folder)
        if same_draft(found.draft, manifest.draft, folder):  # an earlier release wrote it as it lay from elsewhere
            found = found.model_copy(update={"draft": manifest.draft})
        differing = [name for name in ("verifier", "draft", "settings", "policy") if _differs(name, found, manifest)]
        if differing:
            raise TraceError(
                f"{folder} holds traces made with another {differing[0]}; choose another folder or remove this one"
            )
        if found == manifest:
            return
    elif any(folder.glob(SHARDS)):
        raise TraceError(f"{folder} holds shards but no {MANIFEST}; choose another folder or remove them")
    write_json(path, manifest)


def _differs(name: str, found: Manifest, wanted: Manifest) -> bool:
    if name == "settings":  # a smaller batch goes on where a larger one did not fit the memory
        return found.settings.model_copy(update={"batch_size": wanted.settings.batch_size}) != wanted.settings
    if name == "verifier":
        return not found.verifier.agrees_with(wanted.verifier)
    return bool(getattr(found, name) != getattr(wanted, name))


def refuse_other_verifier(traced: VerifierRef, loaded: VerifierRef) -> None:
    """Refuse to learn from the texts of another verifier.

    Raises:
        TraceError: naming both.
    """
    if not traced.says_the_same(loaded):
        what = "a model of another shape" if traced.config_sha256 != loaded.config_sha256 else "other weights"
        raise TraceError(
            f"the traces are of {traced.name_or_path}, and {loaded.name_or_path} has {what}; "
            "give the verifier they were captured on, or capture with this one"
        )


def read_manifest(folder: Path) -> Manifest:
    """What a trace folder was made with.

    Raises:
        TraceError: no manifest, or a damaged one.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(
            f"{folder} is not a trace folder ({MANIFEST}: {error.strerror}); run viasd capture first"
        ) from error
    except ValueError as error:
        raise TraceError(f"{path} is damaged ({type(error).__name__}); capture again into another folder") from error


def held_keys(folder: Path, manifest: Manifest) -> set[str]:
    """Keys of all texts that the shards of a folder hold, asked or not.

    Raises:
        TraceError: a shard is damaged.
    """
    columns = KEY_COLUMNS if manifest.by_tokens else KEY_COLUMNS[:1]
    return {_key(row, manifest) for shard in sorted(folder.glob(SHARDS)) for row in _read_shard(shard, columns)}


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of the texts that are asked, in the order of the manifest and of their turns; those that are there yet.

    A text that was captured under another id or task has the one that is asked.

    Args:
        columns: some of them; None for all.

    Raises:
        TraceError: no shard, a damaged one or a damaged manifest.
    """
    shards = sorted(folder.glob(SHARDS))
    if not shards:
        raise TraceError(f"{folder} holds no trace shards; run viasd capture first")
    manifest = read_manifest(folder)
    wanted = None if columns is None else [*dict.fromkeys([*columns, *KEY_COLUMNS])]
    if manifest.asked is None:
        return [row for shard in shards for row in _read_shard(shard, wanted)]
    asked = {one.key for one in manifest.asked}
    found: dict[str, list[dict[str, Any]]] = {}
    for shard in shards:
        here: dict[str, list[dict[str, Any]]] = {}
        for row in _read_shard(shard, wanted):
            here.setdefault(_key(row, manifest), []).append(row)
        for key, rows in here.items():
            if key in asked:
                found.setdefault(key, sorted(rows, key=lambda row: int(row["turn"])))
    return [row for one in manifest.asked for row in _renamed(found.get(one.key, []), one)]


def _renamed(rows: Iterable[dict[str, Any]], asked: AskedText) -> Iterator[dict[str, Any]]:
    for row in rows:
        named = {"prompt_id": asked.prompt_id, "task": asked.task}
        yield {**row, **{name: value for name, value in named.items() if name in row}}


def _key(row: dict[str, Any], manifest: Manifest) -> str:
    prompt = str(row["prompt_sha256"])
    return text_sha256(prompt, row["turn"], row["prompt_tokens"]) if manifest.by_tokens else prompt


def _read_shard(shard: Path, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    try:
        return list(pq.read_table(shard, columns=None if columns is None else list(columns)).to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise TraceError(f"{shard} is damaged ({error}); remove it and capture again: the rest is kept") from error


def write_shard(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the texts of some prompts, atomically.

    Raises:
        StorageError: it cannot be written.
    """
    dataset = Dataset.from_list(list(rows), features=trace_features())
    with atomic_path(path) as temporary:
        pq.write_table(dataset.data.table, temporary, compression="zstd")


def size_per_token(folder: Path) -> float:
    """Bytes of a folder's shards for each generated token in them."""
    shards = sorted(folder.glob(SHARDS))
    tokens = sum(len(row["tokens"]) for shard in shards for row in _read_shard(shard, ["tokens"]))
    return sum(shard.stat().st_size for shard in shards) / max(tokens, 1)
