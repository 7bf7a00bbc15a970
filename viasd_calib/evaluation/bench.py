"""The benchmark: methods on the same prompts, interleaved prompt by prompt, in one process."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from viasd_calib.calibration.judging import count_diverged
from viasd_calib.choices import Backend, BenchMethod
from viasd_calib.decoding.conversation import Answering, Turn, converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.strategies.base import load_strategy
from viasd_calib.decoding.transformers_baseline import TransformersDecoder
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.exactness import Difference, find_difference
from viasd_calib.evaluation.metrics import MethodResult, PromptResult, pool
from viasd_calib.evaluation.offload_result import OffloadResult, offload_result
from viasd_calib.evaluation.peak_memory import PeakMemory
from viasd_calib.evaluation.provenance import Provenance, read_document
from viasd_calib.hardware import hardware
from viasd_calib.ledger import Ledger
from viasd_calib.models import Verifier, context_length, encode_prompt
from viasd_calib.progress import steps
from viasd_calib.prompt_lengths import check_lengths
from viasd_calib.prompts import Prompt, step_names
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


class TaskResult(BaseModel):
    """The methods on the prompts of one task."""

    model_config = ConfigDict(extra="forbid")

    n_prompts: int
    methods: dict[str, MethodResult]


class BenchResult(BaseModel):
    """The benchmark's JSON.

    Attributes:
        provenance: which policy was measured, on what and when; ``viasd bench`` always notes it.
    """

    model_config = ConfigDict(extra="forbid")

    provenance: Provenance | None = None

    hardware: dict[str, Any]
    settings: BenchSettings
    n_prompts: int
    methods: dict[str, MethodResult]
    offload: OffloadResult | None = None
    by_task: dict[str, TaskResult]


class Timed(NamedTuple):
    """What a method answered to a prompt, and what that took.

    Attributes:
        peak_bytes: most memory of the process; None where it was not asked for, or the system cannot say.
    """

    turns: list[Turn]
    seconds: float
    peak_bytes: int | None


Answered = dict[BenchMethod, PromptResult]
"""Every method on one prompt."""


def run_bench(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    plain: RoutedModel | None = None,
    ledger: Ledger | None = None,
) -> BenchResult:
    """Warm up, then decode every prompt with every method, in an order drawn anew for each prompt.

    The reference texts for ``identical_to_autoregressive`` come from the run itself, or, where
    ``autoregressive`` is not asked for, from an untimed one.

    Args:
        plain: the verifier for ``transformers``, where the engine's backend has changed its own.
        ledger: holds the prompts that are done; they are not decoded again.

    Raises:
        PromptError: prompts do not fit the verifier's context; nothing is decoded.
    """
    check_lengths(engine.verifier, prompts, settings.max_new_tokens)
    kept = ledger or Ledger()
    done: list[Answered] = []
    answerers = {
        name: answering(engine, name, settings.audit, plain, settings.drafting_pays_at) for name in settings.methods
    }
    strategies = [decoder.strategy for decoder in answerers.values() if isinstance(decoder, Decoder)]
    slim = any(strategy.asks_slim for strategy in strategies)
    engine.prepare_passes(text_lengths(engine, prompts, settings.max_new_tokens), slim)
    _warm_up(engine, answerers, prompts[0], min(WARM_UP_TOKENS, settings.max_new_tokens))
    with steps("bench", len(prompts), "prompts") as running:
        for name, prompt in zip(step_names(prompts), prompts, strict=True):
            order = random.Random(f"{settings.seed}/{name}")
            answer = partial(_answer, engine, answerers, prompt, settings, order)
            done.append(_named(kept.recall(name, Answered, answer), prompt))
            running.advance()
    results = {name: [answered[name] for answered in done] for name in settings.methods}
    result = _summarise(results, prompts, settings, hardware(engine.routed.device))
    cold = engine.routed.cold
    if cold is None:
        return result
    memory = offload_result(cold, results, engine.drafter_bytes)
    return result.model_copy(update={"offload": memory})


def _named(answered: Answered, prompt: Prompt) -> Answered:
    """Results with the id and task that their prompt has now: a ledger finds them by its hash."""
    return {
        name: replace(
            result,
            prompt_id=prompt.id,
            task=prompt.task,
            differences=[one.model_copy(update={"prompt_id": prompt.id}) for one in result.differences],
        )
        for name, result in answered.items()
    }


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


def _warm_up(engine: Engine, answerers: Mapping[BenchMethod, Answering], prompt: Prompt, max_new_tokens: int) -> None:
    for decoder in answerers.values():
        list(converse(decoder, engine.verifier, prompt, max_new_tokens))


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
    prompt: Prompt,
    settings: BenchSettings,
    order: random.Random,
) -> Answered:
    device = engine.routed.device if settings.offload is not None else None
    timed = _run_prompt(answerers, engine.verifier, prompt, settings.max_new_tokens, order, device)
    reference = _reference(engine, prompt, settings, timed)
    return {name: _decoded(engine, prompt, one, reference) for name, one in timed.items()}


def _run_prompt(
    answerers: Mapping[BenchMethod, Answering],
    verifier: Verifier,
    prompt: Prompt,
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
        turns = list(converse(answerers[name], verifier, prompt, max_new_tokens))
        seconds = time.perf_counter() - begin
        timed[name] = Timed(turns, seconds, None if measured is None else measured.bytes())
    return timed


def _reference(
    engine: Engine,
    prompt: Prompt,
    settings: BenchSettings,
    timed: dict[BenchMethod, Timed],
) -> list[list[int]]:
    if "autoregressive" in timed:
        turns = timed["autoregressive"].turns
    else:
        turns = list(converse(engine.decoder("autoregressive"), engine.verifier, prompt, settings.max_new_tokens))
    return [turn.generation.tokens for turn in turns]


def _decoded(engine: Engine, prompt: Prompt, timed: Timed, reference: list[list[int]]) -> PromptResult:
    turns = timed.turns
    certificate = engine.spec.certificate
    gap = None if certificate is None else certificate.rounding_gap
    diverged = count_diverged(engine.routed, turns, gap or 0.0)
    found = (
        find_difference(engine.routed, prompt.id, place, turn.prompt_ids, turn.generation.tokens, expected)
        for place, (turn, expected) in enumerate(zip(turns, reference, strict=False))
    )
    # A later turn answers another text once an earlier one has left the reference; there may also be fewer or more.
    first = next((difference for difference in found if difference is not None), None)
    generations = [turn.generation for turn in turns]
    differences = [] if first is None else [first]
    return PromptResult(prompt.id, prompt.task, generations, timed.seconds, diverged, differences, timed.peak_bytes)


def is_lossless(name: BenchMethod, audit: Audit) -> bool:
    """Whether a method's greedy text is q's own, where strategies that take an audit have this one.

    Example:
        >>> is_lossless("transformers", "off"), is_lossless("three_tier", "off"), is_lossless("three_tier", "strict")
        (True, False, True)
    """
    return name == "transformers" or load_strategy(name).is_lossless(audit)


def unexplained(result: BenchResult) -> list[tuple[str, Difference]]:
    """Differences from the autoregressive text that a lossless method must not have, by method."""
    return [
        (name, difference)
        for name, method in result.methods.items()
        if is_lossless(name, result.settings.audit)
        for difference in method.differences
        if not difference.explained
    ]


def _summarise(
    results: dict[BenchMethod, list[PromptResult]],
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    machine: dict[str, Any],
) -> BenchResult:
    tasks = sorted({prompt.task for prompt in prompts})
    by_task: dict[str, TaskResult] = {}
    for task in tasks:
        chosen = {name: [r for r in rows if r.task == task] for name, rows in results.items()}
        by_task[task] = TaskResult(
            n_prompts=sum(prompt.task == task for prompt in prompts), methods=_pool_all(chosen, settings.seed)
        )
    return BenchResult(
        hardware=machine,
        settings=settings,
        n_prompts=len(prompts),
        methods=_pool_all(results, settings.seed),
        by_task=by_task,
    )


def _pool_all(results: dict[BenchMethod, list[PromptResult]], seed: int) -> dict[str, MethodResult]:
    against = {"autoregressive": results.get("autoregressive"), "speculative": results.get("speculative")}
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
