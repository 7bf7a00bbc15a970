"""The benchmark: methods on the same prompts, interleaved prompt by prompt or batch by batch, in one process."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from viasd_calib.choices import Backend, BenchMethod
from viasd_calib.decoding.conversation import Answering, Turn, answer_batch
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.strategies.base import load_strategy
from viasd_calib.decoding.transformers_baseline import TransformersDecoder
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.answered import text_result
from viasd_calib.evaluation.batches import BatchResult, check_batch_sizes, draw_batches
from viasd_calib.evaluation.context_bands import context_bands
from viasd_calib.evaluation.exactness import Difference
from viasd_calib.evaluation.metrics import BASELINES, MeasuredBatch, MethodResult, TextResult, pool
from viasd_calib.evaluation.offload_result import OffloadResult, offload_result, peaks_of
from viasd_calib.evaluation.peak_memory import PeakMemory
from viasd_calib.evaluation.provenance import Provenance, read_document
from viasd_calib.hardware import hardware
from viasd_calib.ledger import Ledger
from viasd_calib.models import Verifier, context_length, encode_prompt
from viasd_calib.progress import steps
from viasd_calib.prompt_lengths import check_lengths
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Audit, OffloadRef

WARM_UP_TOKENS = 16
"""At most: a warm-up asks for no more than the benchmark, which may be all that a certificate holds for."""


class BenchSettings(BaseModel):
    """What was asked of the benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: list[BenchMethod]
    max_new_tokens: int
    dtype: str
    audit: Audit
    seed: int
    drafting_pays_at: float | None = None
    backend: Backend = "eager"
    offload: OffloadRef | None = None


class GroupResult(BaseModel):
    """The methods on the prompts of one task, or on those of about one length."""

    model_config = ConfigDict(extra="forbid")

    n_prompts: int
    methods: dict[str, MethodResult]


class BenchResult(BaseModel):
    """The benchmark's JSON.

    Attributes:
        provenance: which policy was measured, on what and when; ``viasd bench`` always notes it.
        methods: of texts that are decoded one at a time; empty where that was not asked for, and the next two too.
        by_context: the same by the length of prompts, see :mod:`viasd_calib.evaluation.context_bands`: by the most
            tokens that prompts of the group have. Empty in what earlier releases wrote.
        by_batch: the same prompts several at a time, by how many; the JSON has no such entry where that was not asked
            for.
    """

    model_config = ConfigDict(extra="forbid")

    provenance: Provenance | None = None

    hardware: dict[str, Any]
    settings: BenchSettings
    n_prompts: int
    methods: dict[str, MethodResult]
    offload: OffloadResult | None = None
    by_task: dict[str, GroupResult]
    by_context: dict[int, GroupResult] = {}
    by_batch: dict[int, BatchResult] = {}

    @property
    def groups(self) -> dict[str, GroupResult]:
        """By name, the tasks and the lengths of prompts: of either only where there are several."""
        tasks = self.by_task if len(self.by_task) > 1 else {}
        bands = self.by_context if len(self.by_context) > 1 else {}
        return {**tasks, **{f"prompts of up to {bound} tokens": group for bound, group in bands.items()}}

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = handler(self)
        for name in ("by_context", "by_batch"):
            if not getattr(self, name):
                document.pop(name, None)
        return document


class Timed(NamedTuple):
    """What a method answered to the prompts of a batch, and what that took.

    Attributes:
        turns: of each prompt.
        peak_bytes: most memory of the process; None where it was not asked for, or the system cannot say.
    """

    turns: list[list[Turn]]
    seconds: float
    peak_bytes: int | None


Answered = dict[BenchMethod, MeasuredBatch]
"""Every method on one batch of prompts, which is mostly a single prompt."""
Results = dict[BenchMethod, list[MeasuredBatch]]
"""The batches of each method, all in the same order."""


def run_bench(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    plain: RoutedModel | None = None,
    ledger: Ledger | None = None,
    sizes: Collection[int] = (1,),
) -> BenchResult:
    """Warm up, then decode every prompt with every method, in an order drawn anew for each prompt.

    Batches likewise, in an order drawn anew for each batch; the baselines of a method are those of the same batch size.

    The reference texts for ``identical_to_autoregressive`` come from the run itself, or, where
    ``autoregressive`` is not asked for, from an untimed one.

    Args:
        plain: the verifier for ``transformers``, where the engine's backend has changed its own.
        ledger: holds the prompts and batches that are done; they are not decoded again.
        sizes: of batches, each at most the number of prompts; 1 for single texts.

    Raises:
        PromptError: prompts do not fit the verifier's context; nothing is decoded.
        BenchError: there are fewer prompts than texts of a batch, or ``transformers`` is to decode batches.
    """
    check_batch_sizes(sizes, len(prompts), settings.methods)
    check_lengths(engine.verifier, prompts, settings.max_new_tokens)
    kept = ledger or Ledger()
    answerers = {
        name: answering(engine, name, settings.audit, plain, settings.drafting_pays_at) for name in settings.methods
    }
    strategies = [decoder.strategy for decoder in answerers.values() if isinstance(decoder, Decoder)]
    slim = any(strategy.asks_slim for strategy in strategies)
    if 1 in sizes:  # batches have no passes that are made ready
        engine.prepare_passes(text_lengths(engine, prompts, settings.max_new_tokens), slim)
    measured = {size: _measure(engine, answerers, prompts, size, settings, kept) for size in sorted(set(sizes))}
    single = measured.pop(1, {})
    bands = context_bands(engine.verifier, prompts, settings.max_new_tokens)
    result = _summarise(single, prompts, bands, settings, hardware(engine.routed.device))
    by_batch = {size: _batch_result(results, settings.seed) for size, results in measured.items()}
    cold = engine.routed.cold
    memory = None if cold is None else offload_result(cold, single, engine.drafter_bytes)
    return result.model_copy(update={"offload": memory, "by_batch": by_batch})


def _measure(
    engine: Engine,
    answerers: Mapping[BenchMethod, Answering],
    prompts: Sequence[Prompt],
    size: int,
    settings: BenchSettings,
    ledger: Ledger,
) -> Results:
    """Decode all prompts in batches of one size, after a warm-up on the first of them."""
    batches = draw_batches(prompts, size, settings.seed)
    warm_up = min(WARM_UP_TOKENS, settings.max_new_tokens)
    for decoder in answerers.values():
        answer_batch(decoder, engine.verifier, batches[0].prompts, warm_up, size)
    done: list[Answered] = []
    label, unit = ("bench", "prompts") if size == 1 else (f"bench, {size} texts together", "batches")
    with steps(label, len(batches), unit) as running:
        for step, chosen in batches:
            order = random.Random(f"{settings.seed}/{step}")
            answer = partial(_answer, engine, answerers, chosen, size, settings, order)
            done.append(_named(ledger.recall(step, Answered, answer), chosen))
            running.advance()
    return {name: [answered[name] for answered in done] for name in settings.methods}


def _named(answered: Answered, prompts: Sequence[Prompt]) -> Answered:
    """Results with the ids and tasks that their prompts have now: a ledger finds them by their hashes."""
    return {
        name: replace(result, texts=[_with_id(*pair) for pair in zip(result.texts, prompts, strict=True)])
        for name, result in answered.items()
    }


def _with_id(text: TextResult, prompt: Prompt) -> TextResult:
    differences = [one.model_copy(update={"prompt_id": prompt.id}) for one in text.differences]
    return replace(text, prompt_id=prompt.id, task=prompt.task, differences=differences)


def text_lengths(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int) -> set[int]:
    """Positions that the texts of ``prompts`` may take, answers included; up to how answers are tokenised again."""
    lengths: set[int] = set()
    for prompt in prompts:
        for turns in range(1, len(prompt.turns) + 1):
            unanswered = encode_prompt(engine.verifier, prompt, [""] * (turns - 1), max_new_tokens)
            shortest = len(unanswered) + max_new_tokens
            longest = min(shortest + (turns - 1) * max_new_tokens, context_length(engine.verifier.model.config))
            lengths.update(range(shortest, longest + 1))
    return lengths


def answering(
    engine: Engine,
    name: BenchMethod,
    audit: Audit,
    plain: RoutedModel | None = None,
    drafting_pays_at: float | None = None,
) -> Answering:
    """What answers prompts by a method's name.

    Args:
        plain: the verifier for ``transformers``, if not the engine's.
        drafting_pays_at: in place of the spec's.
    """
    if name == "transformers":
        return TransformersDecoder(plain or engine.routed, engine.verifier.eos_ids)
    return engine.decoder(name, audit, drafting_pays_at=drafting_pays_at)


def _answer(
    engine: Engine,
    answerers: Mapping[BenchMethod, Answering],
    prompts: Sequence[Prompt],
    size: int,
    settings: BenchSettings,
    order: random.Random,
) -> Answered:
    device = engine.routed.device if settings.offload is not None else None
    timed = _run_batch(answerers, engine.verifier, prompts, size, settings.max_new_tokens, order, device)
    if "autoregressive" in timed:
        reference = timed["autoregressive"].turns
    else:
        plain = engine.decoder("autoregressive")
        reference = answer_batch(plain, engine.verifier, prompts, settings.max_new_tokens, size)
    return {name: _decoded(engine, prompts, one, reference) for name, one in timed.items()}


def _run_batch(
    answerers: Mapping[BenchMethod, Answering],
    verifier: Verifier,
    prompts: Sequence[Prompt],
    size: int,
    max_new_tokens: int,
    order: random.Random,
    device: torch.device | None,
) -> dict[BenchMethod, Timed]:
    names = list(answerers)
    order.shuffle(names)
    timed: dict[BenchMethod, Timed] = {}
    for name in names:
        measured = PeakMemory(device) if device is not None else None
        begin = time.perf_counter()
        turns = answer_batch(answerers[name], verifier, prompts, max_new_tokens, size)
        seconds = time.perf_counter() - begin
        timed[name] = Timed(turns, seconds, None if measured is None else measured.bytes())
    return timed


def _decoded(
    engine: Engine, prompts: Sequence[Prompt], timed: Timed, reference: Sequence[Sequence[Turn]]
) -> MeasuredBatch:
    texts = [text_result(engine, *one) for one in zip(prompts, timed.turns, reference, strict=True)]
    return MeasuredBatch(texts, timed.seconds, timed.peak_bytes)


def is_lossless(name: BenchMethod, audit: Audit) -> bool:
    """Whether a method's greedy text is q's own, where strategies that take an audit have this one.

    Example:
        >>> is_lossless("transformers", "off"), is_lossless("three_tier", "off"), is_lossless("three_tier", "strict")
        (True, False, True)
    """
    return name == "transformers" or load_strategy(name).is_lossless(audit)


def unexplained(result: BenchResult) -> list[tuple[str, Difference]]:
    """Differences from the autoregressive text that a lossless method must not have, by method and batch size."""
    together = {f" in batches of {size}": found.methods for size, found in result.by_batch.items()}
    return [
        (f"{name}{where}", difference)
        for where, methods in {"": result.methods, **together}.items()
        for name in result.settings.methods
        if name in methods and is_lossless(name, result.settings.audit)
        for difference in methods[name].differences
        if not difference.explained
    ]


Group = TypeVar("Group", str, int)


def _summarise(
    results: Results, prompts: Sequence[Prompt], bands: Sequence[int], settings: BenchSettings, machine: dict[str, Any]
) -> BenchResult:
    """The benchmark of single texts, in the order of their prompts; of none where there are no results.

    Args:
        bands: of the prompts' lengths.
    """

    def grouped(groups: Sequence[Group]) -> dict[Group, GroupResult]:
        return {
            group: _group_result(results, [place for place, one in enumerate(groups) if one == group], settings.seed)
            for group in (sorted(set(groups)) if results else ())
        }

    return BenchResult(
        hardware=machine,
        settings=settings,
        n_prompts=len(prompts),
        methods=_pool_all(results, settings.seed),
        by_task=grouped([prompt.task for prompt in prompts]),
        by_context=grouped(bands),
    )


def _group_result(results: Results, places: Sequence[int], seed: int) -> GroupResult:
    """The methods on the prompts at some places."""
    chosen = {name: [rows[place] for place in places] for name, rows in results.items()}
    return GroupResult(n_prompts=len(places), methods=_pool_all(chosen, seed))


def _batch_result(results: Results, seed: int) -> BatchResult:
    texts = [len(one.texts) for one in next(iter(results.values()))]
    return BatchResult(texts=texts, methods=_pool_all(results, seed), peak_memory_bytes=peaks_of(results))


def _pool_all(results: Results, seed: int) -> dict[str, MethodResult]:
    against = {name: results[name] for name in BASELINES if name in results}
    return {name: pool(rows, against, seed) for name, rows in results.items()}


def load_bench(path: str | Path) -> BenchResult:
    """Read a benchmark's JSON.

    Raises:
        BenchError: missing, damaged, or of an earlier release, which did not note what was measured.
    """
    document, _ = read_document(path)
    try:
        return BenchResult.model_validate(document)
    except ValueError as error:
        raise BenchError(f"{path} is missing or not a benchmark's JSON; run viasd bench first") from error
