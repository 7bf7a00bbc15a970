"""Decoding strategies on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viasd_calib.choices import BENCH_METHODS
from viasd_calib.devices import check_device
from viasd_calib.errors import BenchError
from viasd_calib.files import write_json
from viasd_calib.ledger import ledger_beside
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_audit, check_out_file, check_spec
from viasd_calib.pipeline.lists import parse_counts, parse_methods
from viasd_calib.pipeline.notices import notice_resumed, notice_uncertified
from viasd_calib.pipeline.opening import open_engine
from viasd_calib.pipeline.options import BenchOptions
from viasd_calib.pipeline.prompt_choice import check_prompts, choose_unseen
from viasd_calib.prompts import Prompt, split_sha256
from viasd_calib.spec import file_sha256


def bench(
    options: BenchOptions, load: lazy_types.LoadVerifier | None = None, command: str = ""
) -> lazy_types.BenchResult:
    """Compare decoding strategies: same weights, same drafter, interleaved prompt by prompt; write the result as JSON.

    Texts are decoded one at a time, or so many together as asked; then strategies are interleaved batch by batch.
    Prompts and batches that are done are noted beside the result until it is written: run again, a bench that was
    stopped goes on.

    Args:
        command: that was given, for the provenance.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    check_out_file("--json", options.json)
    check_device(options.device)
    methods = parse_methods(options.methods, BENCH_METHODS, BenchError)
    sizes = parse_counts("--batch", options.batch, BenchError)
    check_audit(options.audit, methods)
    path, spec = check_spec(options.spec, options.verifier, options.draft_model)
    unseen = choose_unseen(options, spec)
    chosen = unseen.prompts

    from viasd_calib.evaluation.batches import check_batch_sizes, draw_batches

    check_batch_sizes(sizes, len(chosen), methods)

    from viasd_calib.decoding.engine import watched_spec
    from viasd_calib.evaluation.bench import BenchSettings, run_bench
    from viasd_calib.evaluation.provenance import PromptsMeasured, note_provenance
    from viasd_calib.hardware import hardware

    engine = open_engine(path, spec, options, load, options.backend)
    check_prompts(engine.verifier, chosen, options.max_new_tokens)
    cold = engine.routed.cold
    settings = BenchSettings(
        methods=methods,
        max_new_tokens=options.max_new_tokens,
        dtype=options.dtype or engine.spec.verifier.dtype,
        audit=options.audit or engine.spec.decoding.audit,
        drafting_pays_at=options.drafting_pays_at,
        seed=options.seed,
        backend=engine.backend,
        offload=None if cold is None else cold.offload.entry(),
    )
    if "three_tier" in settings.methods:
        notice_uncertified(engine.spec, options.audit)
    job = {
        "settings": settings.model_dump(mode="json"),
        "spec": file_sha256(Path(path)),
        "verifier": [options.verifier, engine.verifier.ref.weights],
        "hardware": hardware(engine.routed.device),
    }
    ledger = ledger_beside(options.json, job)
    done = [batch.step for size in sizes for batch in draw_batches(chosen, size, options.seed)]
    notice_resumed(ledger, "prompts" if sizes == [1] else "prompts and batches", done)
    result = run_bench(engine, chosen, settings, _plain_verifier(engine, settings), ledger, sizes)
    if result.offload is not None and result.methods:
        plain = _plain_peak(engine, result.offload, chosen, options.max_new_tokens)
        memory = result.offload.model_copy(update={"plain_peak_memory_bytes": plain})
        result = result.model_copy(update={"offload": memory})
    measured = PromptsMeasured(
        file=Path(options.prompts).name if Path(options.prompts).exists() else options.prompts,
        sha256=split_sha256(chosen),
        split=options.split,
        limit=options.limit,
        left_out=unseen.left_out,
        fitted_included=options.include_fitted,
    )
    provenance = note_provenance(watched_spec(spec, options.drafting_pays_at), engine.verifier.ref, measured, command)
    result = result.model_copy(update={"provenance": provenance})
    write_json(Path(options.json), result)
    ledger.close()
    return result


def _plain_peak(
    engine: lazy_types.Engine, memory: lazy_types.OffloadResult, prompts: Sequence[Prompt], max_new_tokens: int
) -> int | None:
    """The peak of memory of the verifier alone, on the prompt whose first turn is the longest."""
    from viasd_calib.evaluation.plain_peak import PlainRun, plain_peak
    from viasd_calib.models import DTYPE_NAMES, encode_prompt

    texts = [encode_prompt(engine.verifier, prompt, [], max_new_tokens) for prompt in prompts]
    run = PlainRun(
        verifier=engine.verifier.ref.name_or_path,
        dtype=DTYPE_NAMES[engine.routed.dtype],
        device=str(engine.routed.device),
        backend=engine.backend,
        prompt=max(texts, key=len),
        max_new_tokens=max_new_tokens,
    )
    return plain_peak(run, memory.resident_bytes + memory.cold_bytes)


def _plain_verifier(engine: lazy_types.Engine, settings: lazy_types.BenchSettings) -> lazy_types.RoutedModel | None:
    """A second copy of the verifier for transformers' own generate, where the backend has changed the engine's.

    Where the engine reads layers for each pass, accelerate does so for it.
    """
    if "transformers" not in settings.methods or (engine.backend == "eager" and engine.routed.cold is None):
        return None
    from viasd_calib.models import DTYPE_NAMES, load_verifier
    from viasd_calib.models.offloaded import load_by_accelerate
    from viasd_calib.slim.forward import RoutedModel

    name = engine.verifier.ref.name_or_path  # as it was found
    if engine.routed.cold is not None:
        return RoutedModel(load_by_accelerate(name, engine.routed.dtype, engine.routed.device))
    dtype = DTYPE_NAMES[engine.routed.dtype]
    return RoutedModel(load_verifier(name, dtype=dtype, device=str(engine.routed.device)).model)
