"""Capture: let q, or a policy in its place, answer prompts in batches and log what p and q said at every place.

A trace folder holds ``capture.json`` (what it was made with) and shards. Each shard is written whole or
not at all and its texts follow from its number alone, so that a run that was killed goes on where it
stopped, without a lost or doubled text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.summary import stack_summaries, summarize
from viasd_calib.draft.base import Drafter
from viasd_calib.errors import TraceError
from viasd_calib.file_names import MANIFEST
from viasd_calib.files import atomic_path, write_json
from viasd_calib.models import Verifier, encode_prompt
from viasd_calib.progress import progress_bar
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import VerifierRef
from viasd_calib.traces.generation import Answer, generate_batch
from viasd_calib.traces.on_policy import Policy
from viasd_calib.traces.schema import summary_columns, trace_features

Item = TypeVar("Item")

MAX_DEPTH = 6
"""Drafts are logged as they stand after 0 to 5 drafted, unverified tokens: the depths of a block of default length."""


class CaptureSettings(BaseModel):
    """What decides the content of a trace folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(128, ge=1)
    batch_size: int = Field(32, ge=1)
    top_k: int = Field(16, ge=2, le=256)
    temperature: float = Field(0.0, ge=0)
    sampling_top_k: int = Field(50, ge=1)
    seed: int = 0


class Manifest(BaseModel):
    """Identity of a trace folder.

    Attributes:
        policy: name of what decoded the texts; None where q wrote them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verifier: VerifierRef
    draft: str
    settings: CaptureSettings
    prompts_sha256: str
    n_prompts: int
    policy: str | None = None


@dataclass(frozen=True)
class Asked:
    """What one text answers: a turn of a prompt, with all that came before it, as token ids."""

    prompt_id: str
    prompt_sha256: str
    task: str
    turn: int
    ids: list[int]


@dataclass(frozen=True)
class CaptureReport:
    """What a capture run left behind."""

    folder: Path
    texts: int
    tokens: int
    bytes_per_token: float
    resumed_shards: int


def shard_name(number: int) -> str:
    """File name of shard ``number``."""
    return f"shard-{number:05d}.parquet"


def plan_shards(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Batches of prompts of like length; the order follows from the prompts alone."""
    ordered = sorted(prompts, key=lambda prompt: (sum(map(len, prompt.turns)), prompt.sha256, prompt.id))
    return _cut(ordered, batch_size)


def _cut(ordered: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(ordered[begin : begin + size]) for begin in range(0, len(ordered), size)]


def capture(
    verifier: Verifier,
    drafter: Drafter | None,
    draft_name: str,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: CaptureSettings,
    policy: Policy | None = None,
) -> CaptureReport:
    """Fill ``folder`` with the traces of ``prompts``; shards that are there already are kept.

    Args:
        drafter: whose proposals are logged beside q's choices; None logs q alone.
        draft_name: how the drafter is named in the manifest.
        policy: what answers; None for q.

    Raises:
        TraceError: the folder holds traces of other prompts, models, settings or another policy.
        PromptError: a prompt does not fit the verifier's context.
        StorageError: a shard cannot be written.
    """
    asked = [f"{prompt.id}\t{prompt.sha256}" for prompt in prompts]
    manifest = _manifest(verifier, draft_name, settings, asked, policy)
    tracer = _Tracer(RoutedModel(verifier.model), verifier.eos_ids, drafter, settings, policy)
    shards = plan_shards(prompts, settings.batch_size)
    return _fill(folder, manifest, shards, lambda shard, number: _trace_turns(tracer, verifier, shard, number))


def capture_again(
    verifier: Verifier,
    drafter: Drafter,
    draft_name: str,
    asked: Sequence[Asked],
    folder: Path,
    settings: CaptureSettings,
    policy: Policy,
) -> CaptureReport:
    """Fill ``folder`` with a policy's answers to what earlier traces were asked, as :func:`capture` does.

    A later turn stands behind the answers that it stood behind in the earlier traces.

    Raises:
        TraceError: the folder holds other traces.
        StorageError: a shard cannot be written.
    """
    lines = [f"{one.prompt_id}\t{one.ids}" for one in asked]
    manifest = _manifest(verifier, draft_name, settings, lines, policy)
    tracer = _Tracer(RoutedModel(verifier.model), verifier.eos_ids, drafter, settings, policy)
    ordered = sorted(asked, key=lambda one: (len(one.ids), one.prompt_sha256, one.prompt_id, one.turn, one.ids))
    shards = _cut(ordered, settings.batch_size)
    return _fill(folder, manifest, shards, lambda shard, number: tracer.rows(shard, _seed(settings, number)))


def _fill(
    folder: Path,
    manifest: Manifest,
    shards: Sequence[list[Item]],
    rows_of: Callable[[list[Item], int], Iterable[dict[str, Any]]],
) -> CaptureReport:
    """Write the shards that are missing.

    Args:
        rows_of: the rows of a shard, from what it answers and its number.
    """
    _open_folder(folder, manifest)
    missing = [number for number in range(len(shards)) if not (folder / shard_name(number)).is_file()]
    with progress_bar("texts") as progress:
        total = sum(len(shard) for shard in shards)
        done = total - sum(len(shards[number]) for number in missing)
        task = progress.add_task("capture", total=total, completed=done)
        for number in missing:
            _write_shard(folder / shard_name(number), list(rows_of(shards[number], number)))
            progress.update(task, advance=len(shards[number]))
    return _report(folder, len(shards) - len(missing))


def _manifest(
    verifier: Verifier, draft_name: str, settings: CaptureSettings, asked: Sequence[str], policy: Policy | None
) -> Manifest:
    """What identifies a folder; ``asked`` has a line for each thing that is answered, in any order."""
    return Manifest(
        verifier=verifier.ref,
        draft=draft_name,
        settings=settings,
        prompts_sha256=hashlib.sha256("\n".join(sorted(asked)).encode()).hexdigest(),
        n_prompts=len(asked),
        policy=None if policy is None else policy.name,
    )


def _seed(settings: CaptureSettings, shard: int) -> int:
    return settings.seed + 1000 * shard


def _open_folder(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    if path.is_file():
        found = read_manifest(folder)
        differing = [name for name in Manifest.model_fields if getattr(found, name) != getattr(manifest, name)]
        if found.verifier.agrees_with(manifest.verifier):  # an earlier release noted no weights
            differing = [name for name in differing if name != "verifier"]
        if differing:
            raise TraceError(
                f"{folder} holds traces made with another {differing[0]}; choose another folder or remove this one"
            )
        return
    if any(folder.glob("shard-*.parquet")):
        raise TraceError(f"{folder} holds shards but no {MANIFEST}; choose another folder or remove them")
    write_json(path, manifest)


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


@dataclass(frozen=True)
class _Tracer:
    """Who answers, who drafts, and what is logged of it."""

    model: RoutedModel
    eos_ids: frozenset[int]
    drafter: Drafter | None
    settings: CaptureSettings
    policy: Policy | None

    def rows(self, asked: Sequence[Asked], seed: int) -> list[dict[str, Any]]:
        """A row for each text, in the order of ``asked``."""
        answers = self._answers([one.ids for one in asked], seed)
        return [
            {
                "prompt_id": one.prompt_id,
                "prompt_sha256": one.prompt_sha256,
                "task": one.task,
                "turn": one.turn,
                "prompt_tokens": one.ids,
                "tokens": answer.tokens,
                **summary_columns("q", stack_summaries(answer.said)),
                **draft_columns(self.drafter, one.ids, answer, self.settings, seed=seed * 1000 + place),
            }
            for place, (one, answer) in enumerate(zip(asked, answers, strict=True))
        ]

    def _answers(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Answer]:
        settings = self.settings
        taps = () if self.drafter is None else self.drafter.taps
        if self.policy is not None:
            return self.policy.answer(
                prompts, max_new_tokens=settings.max_new_tokens, summary_top=settings.top_k, taps=taps
            )
        return generate_batch(
            self.model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            eos_ids=self.eos_ids,
            sampling=Sampling(temperature=settings.temperature, top_k=settings.sampling_top_k, seed=seed),
            summary_top=settings.top_k,
            taps=taps,
        )


def _trace_turns(
    tracer: _Tracer, verifier: Verifier, prompts: Sequence[Prompt], number: int
) -> Iterator[dict[str, Any]]:
    """Rows of one shard: every turn of its prompts, later turns after the earlier answers of whoever answers."""
    settings = tracer.settings
    answers: dict[str, list[str]] = {prompt.id: [] for prompt in prompts}
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [
            Asked(
                prompt.id, prompt.sha256, prompt.task, turn,
                encode_prompt(verifier, prompt, answers[prompt.id], settings.max_new_tokens),
            )
            for prompt in prompts if turn < len(prompt.turns)
        ]  # fmt: skip
        for row in tracer.rows(asked, _seed(settings, number) + turn):
            answers[row["prompt_id"]].append(str(verifier.tokenizer.decode(row["tokens"], skip_special_tokens=True)))
            yield row


@torch.inference_mode()
def draft_columns(
    drafter: Drafter | None, prompt: Sequence[int], answer: Answer, settings: CaptureSettings, seed: int
) -> dict[str, Any]:
    """What p would have drafted at every generated place of one text: columns of its row."""
    if drafter is None:
        return {**summary_columns("p", None), "p_token": [], "p_depth": []}
    tapped = torch.cat(answer.tapped)  # [length - 1, taps, hidden]
    text = torch.tensor([*prompt, *answer.tokens[:-1]], device=tapped.device)  # [length - 1]
    begin = len(prompt) - 1
    depth = random_depths(text.shape[0], MAX_DEPTH, seed).to(tapped.device)
    drafted, logits = drafter.score(text, tapped, depth)
    said = None if logits is None else summarize(logits[begin:], settings.top_k, drafter.vocabulary)
    return {
        **summary_columns("p", said),
        "p_token": drafted[begin:].tolist(),
        "p_depth": depth[begin:].tolist(),
    }


def random_depths(length: int, longest: int, seed: int) -> Tensor:
    """Cut a text into runs of 1 to ``longest`` places; the place within its run, [length], long.

    Example:
        >>> random_depths(6, 1, seed=0).tolist()
        [0, 0, 0, 0, 0, 0]
    """
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(1, longest + 1, (length,), generator=generator).tolist()
    return torch.cat([torch.arange(run) for run in runs])[:length]


def _write_shard(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    dataset = Dataset.from_list(list(rows), features=trace_features())
    with atomic_path(path) as temporary:
        pq.write_table(dataset.data.table, temporary, compression="zstd")


def _report(folder: Path, resumed: int) -> CaptureReport:
    shards = sorted(folder.glob("shard-*.parquet"))
    lengths = [length for path in shards for length in _text_lengths(path)]
    tokens = sum(lengths)
    size = sum(path.stat().st_size for path in shards)
    return CaptureReport(folder, len(lengths), tokens, size / max(tokens, 1), resumed)


def _text_lengths(shard: Path) -> list[int]:
    """Generated tokens of each text of a shard."""
    try:
        return [len(tokens) for tokens in pq.read_table(shard, columns=["tokens"])["tokens"].to_pylist()]
    except (pa.ArrowInvalid, OSError) as error:
        raise TraceError(f"{shard} is damaged ({error}); remove it and capture again: the rest is kept") from error
