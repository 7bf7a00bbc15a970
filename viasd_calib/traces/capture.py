"""Capture: let q, or a policy in its place, answer prompts in batches and log statistics of p and q at every place.

A text follows from its prompt, its turn and the settings, not from the batch in which it was written, nor from what
else is asked: so a folder (:mod:`~viasd_calib.traces.folder`) keeps what it holds when other prompts are asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.top_k import stack_top_k, top_k_statistics
from viasd_calib.draft.base import Drafter
from viasd_calib.models import Verifier
from viasd_calib.progress import steps
from viasd_calib.prompt_copies import normalised_sha256
from viasd_calib.prompt_lengths import check_lengths, encode_turn
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.folder import (
    AskedText,
    CaptureSettings,
    Manifest,
    held_keys,
    open_folder,
    read_rows,
    shard_name,
    size_per_token,
    text_sha256,
    write_shard,
)
from viasd_calib.traces.generation import Answer, answer_batch
from viasd_calib.traces.on_policy import Policy
from viasd_calib.traces.schema import top_k_columns

Item = TypeVar("Item")


@dataclass(frozen=True)
class Asked:
    """What one text answers: a turn of a prompt, with all that came before it, as token ids.

    Attributes:
        prompt_sha256: of the prompt as it was written.
        normalised_sha256: of its normalised text; empty where traces of an earlier release do not hold it.
    """

    prompt_id: str
    prompt_sha256: str
    task: str
    turn: int
    ids: list[int]
    normalised_sha256: str = ""

    @property
    def sha256(self) -> str:
        """Hash of prompt, turn and ids."""
        return text_sha256(self.prompt_sha256, self.turn, self.ids)

    @property
    def number(self) -> int:
        """What its draws follow from, beside the seed: its prompt and turn, not its place in a batch."""
        return int(hashlib.sha256(f"{self.prompt_sha256} {self.turn}".encode()).hexdigest()[:12], 16)


@dataclass(frozen=True)
class CaptureReport:
    """What a capture run wrote.

    Attributes:
        texts: that are asked; there is one for each turn.
        tokens: generated, of these texts.
        bytes_per_token: of the shards.
        asked: prompts, or single texts where those are asked.
        kept: of these, how many a shard held before.
    """

    folder: Path
    texts: int
    tokens: int
    bytes_per_token: float
    asked: int
    kept: int


def capture_traces(
    verifier: Verifier,
    drafter: Drafter | None,
    draft_name: str,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: CaptureSettings,
    policy: Policy | None = None,
    model: RoutedModel | None = None,
) -> CaptureReport:
    """Fill ``folder`` with the traces of ``prompts``; what it holds of them is kept, and what is not asked left out.

    A later turn that does not fit into the context with the answers before it is not asked.

    Args:
        drafter: whose proposals are logged beside q's choices; None logs q alone.
        draft_name: how the drafter is named in the manifest.
        policy: what answers; None for q.
        model: the verifier as a backend runs it; None for its own modules.

    Raises:
        TraceError: the folder holds traces of other models, settings or another policy, or is damaged.
        PromptError: prompts do not fit the verifier's context; nothing is captured.
        StorageError: a shard cannot be written.
    """
    check_lengths(verifier, prompts, settings.max_new_tokens)
    ordered = sorted(prompts, key=lambda prompt: (sum(map(len, prompt.turns)), prompt.sha256, prompt.id))
    asked = [AskedText(prompt_id=one.id, prompt_sha256=one.sha256, task=one.task) for one in ordered]
    named = [f"{prompt.id}\t{prompt.sha256}" for prompt in prompts]
    manifest = _manifest(verifier, draft_name, settings, asked, named, policy)
    tracer = _Tracer(model or RoutedModel(verifier.model), verifier.eos_ids, drafter, settings, policy)
    items = {prompt.sha256: prompt for prompt in ordered}
    return _fill(folder, manifest, items, lambda batch: _trace_turns(tracer, verifier, batch))


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

    A later turn follows the answers that it followed in the earlier traces.

    Raises:
        TraceError: the folder holds other traces.
        StorageError: a shard cannot be written.
    """
    ordered = sorted(asked, key=lambda one: (len(one.ids), one.prompt_sha256, one.prompt_id, one.turn, one.ids))
    texts = [
        AskedText(prompt_id=one.prompt_id, prompt_sha256=one.prompt_sha256, task=one.task, text_sha256=one.sha256)
        for one in ordered
    ]
    named = [f"{one.prompt_id}\t{one.ids}" for one in asked]
    manifest = _manifest(verifier, draft_name, settings, texts, named, policy)
    tracer = _Tracer(RoutedModel(verifier.model), verifier.eos_ids, drafter, settings, policy)
    return _fill(folder, manifest, {one.sha256: one for one in ordered}, tracer.rows)


def _fill(
    folder: Path,
    manifest: Manifest,
    items: Mapping[str, Item],
    rows_of: Callable[[list[Item]], Iterable[dict[str, Any]]],
) -> CaptureReport:
    """Write shards of what no shard holds yet.

    Args:
        items: what is asked, by key, in an order in which neighbours are of like length.
        rows_of: the rows of a batch.
    """
    open_folder(folder, manifest)
    held = held_keys(folder, manifest)
    missing = [key for key in items if key not in held]
    size = manifest.settings.batch_size
    with steps("capture", len(items), "texts", done=len(items) - len(missing)) as running:
        for begin in range(0, len(missing), size):
            keys = missing[begin : begin + size]
            write_shard(folder / shard_name(keys), list(rows_of([items[key] for key in keys])))
            running.advance(len(keys))
    lengths = [len(row["tokens"]) for row in read_rows(folder, ["tokens"])] if items else []
    kept = len(items) - len(missing)
    return CaptureReport(folder, len(lengths), sum(lengths), size_per_token(folder), len(items), kept)


def _manifest(
    verifier: Verifier,
    draft_name: str,
    settings: CaptureSettings,
    asked: list[AskedText],
    named: Sequence[str],
    policy: Policy | None,
) -> Manifest:
    """What identifies a folder; ``named`` has a line for each thing that is answered, in any order."""
    return Manifest(
        verifier=verifier.ref,
        draft=draft_name,
        settings=settings,
        prompts_sha256=hashlib.sha256("\n".join(sorted(named)).encode()).hexdigest(),
        n_prompts=len(named),
        policy=None if policy is None else policy.name,
        asked=asked,
    )


@dataclass(frozen=True)
class _Tracer:
    """Who answers, who drafts, and what is logged of it."""

    model: RoutedModel
    eos_ids: frozenset[int]
    drafter: Drafter | None
    settings: CaptureSettings
    policy: Policy | None

    def rows(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """A row for each text, in the order of ``asked``."""
        answers = self._answers(asked)
        return [
            {
                "prompt_id": one.prompt_id,
                "prompt_sha256": one.prompt_sha256,
                "normalised_sha256": one.normalised_sha256,
                "task": one.task,
                "turn": one.turn,
                "prompt_tokens": one.ids,
                "tokens": answer.tokens,
                **top_k_columns("q", stack_top_k(answer.top_k)),
                **draft_columns(self.drafter, one.ids, answer, self.settings, seed=self.settings.seed + one.number),
            }
            for one, answer in zip(asked, answers, strict=True)
        ]

    def _answers(self, asked: Sequence[Asked]) -> list[Answer]:
        settings = self.settings
        prompts, numbers = [one.ids for one in asked], [one.number for one in asked]
        taps = () if self.drafter is None else self.drafter.taps
        if self.policy is not None:
            return self.policy.answer(
                prompts,
                max_new_tokens=settings.max_new_tokens,
                top_k_size=settings.top_k,
                taps=taps,
                numbers=numbers,
            )
        return answer_batch(
            self.model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            eos_ids=self.eos_ids,
            sampling=Sampling(temperature=settings.temperature, top_k=settings.sampling_top_k, seed=settings.seed),
            top_k_size=settings.top_k,
            taps=taps,
            numbers=numbers,
        )


def _trace_turns(tracer: _Tracer, verifier: Verifier, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Rows of some prompts: every turn, later ones after the earlier answers of whoever answers."""
    answers: dict[str, list[str]] = {prompt.sha256: [] for prompt in prompts}
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked: list[Asked] = []
        for prompt in prompts:
            earlier = answers[prompt.sha256]
            if turn == len(earlier) and turn < len(prompt.turns):  # else an earlier one did not fit into the context
                ids = encode_turn(verifier, prompt, earlier, tracer.settings.max_new_tokens)
                if ids is not None:
                    known_by = normalised_sha256(prompt)
                    asked.append(Asked(prompt.id, prompt.sha256, prompt.task, turn, ids, known_by))
        if not asked:
            return
        for row in tracer.rows(asked):
            text = str(verifier.tokenizer.decode(row["tokens"], skip_special_tokens=True))
            answers[row["prompt_sha256"]].append(text)
            yield row


@torch.inference_mode()
def draft_columns(
    drafter: Drafter | None, prompt: Sequence[int], answer: Answer, settings: CaptureSettings, seed: int
) -> dict[str, Any]:
    """What p would have drafted at every generated place of one text: columns of its row."""
    if drafter is None:
        return {**top_k_columns("p", None), "p_token": [], "p_depth": []}
    tapped = torch.cat(answer.tapped)  # [length - 1, taps, hidden]
    text = torch.tensor([*prompt, *answer.tokens[:-1]], device=tapped.device)  # [length - 1]
    begin = len(prompt) - 1
    # q reads the prompt: no block begins in it.
    inside = random_depths(len(answer.tokens), settings.draft_length, seed)  # [n]
    depth = torch.cat([inside.new_zeros(begin), inside]).to(tapped.device)  # [length - 1]
    drafted, logits = drafter.score(text, tapped, depth, len(prompt))
    top_k = None if logits is None else top_k_statistics(logits[begin:], settings.top_k, drafter.vocabulary)
    return {
        **top_k_columns("p", top_k),
        "p_token": drafted[begin:].tolist(),
        "p_depth": depth[begin:].tolist(),
    }


def random_depths(length: int, longest: int, seed: int) -> Tensor:
    """Cut ``length`` places into blocks of 1 to ``longest``; the place within its block, [length], long.

    Example:
        >>> random_depths(6, 1, seed=0).tolist()
        [0, 0, 0, 0, 0, 0]
    """
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(1, longest + 1, (length,), generator=generator).tolist()
    return torch.cat([torch.arange(run) for run in runs])[:length]
