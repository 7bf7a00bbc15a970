"""``viasd bench`` and ``viasd report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console

from viasd_calib.choices import BENCH_METHODS, Backend, StrategyName
from viasd_calib.cli import command_line
from viasd_calib.cli.notices import notice_resumed, notice_uncertified, say_written
from viasd_calib.devices import check_device
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.provenance import check_policy
from viasd_calib.file_names import CALIBRATE_FILE
from viasd_calib.files import read_json, write_json
from viasd_calib.ledger import ledger_beside
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.checks import check_bench, check_calibrate_folder, check_out_file, check_spec
from viasd_calib.pipeline.lists import parse_methods
from viasd_calib.pipeline.numbers import Count, Seed
from viasd_calib.pipeline.prompt_choice import check_prompts, choose_unseen, notice_other_prompts
from viasd_calib.prompts import EMBEDDED, Prompt, Split, SplitShares, split_sha256, step_names
from viasd_calib.spec import Audit, DType, file_sha256

ROUND_METHODS: tuple[StrategyName, ...] = ("speculative", "three_tier")
"""Methods of which the report shows a round."""

ROUND_PROMPTS = 2
"""Prompts that these rounds are recorded on: some dozens of rounds, of which one is shown."""


def bench(
    spec: str,
    json: str,
    prompts: str = EMBEDDED,
    split: Split | None = None,
    shares: SplitShares | None = None,
    methods: str = "autoregressive,speculative,three_tier",
    limit: Count | None = None,
    include_fitted: bool = False,
    max_new_tokens: Count = 128,
    dtype: DType | None = None,
    audit: Audit | None = None,
    seed: Seed = 0,
    verifier: str | None = None,
    draft_model: str | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
    _load: lazy_types.LoadVerifier | None = None,
) -> lazy_types.BenchResult:
    """Compare decoding methods on a prompt file: same weights, same drafter, interleaved prompt by prompt.

    Prompts that are done are noted beside the result until it is written: run again, a bench that was stopped goes on.

    Args:
        spec: path of the routing spec.
        json: where the result is written.
        prompts: prompt file (JSONL or another: see README), NAME:SPLIT of a data set of the hub, or "embedded" for the
            package's own.
        split: take this split's prompts alone, by hash; null takes all.
        shares: shares of the splits.
        methods: comma-separated; an unknown one is answered with the list of those there are.
        limit: take this many prompts, spread evenly over the tasks.
        include_fitted: take in the prompts that the spec was fitted or calibrated on, which are left out by default.
        max_new_tokens: longest answer.
        dtype: number format, in place of the spec's.
        audit: of three_tier, in place of the spec's.
        seed: of the order of methods and of the bootstrap.
        verifier: where to find the verifier, in place of the name in the spec.
        draft_model: the same for the draft model, where the spec names one.
        device: where models run.
        backend: what runs them: eager, packed (CPU) or compiled (minutes to compile first); the faster one of the
            first two where it is left out. transformers' own generate always runs eager.
    """
    check_out_file("--json", json)
    check_device(device)
    chosen_methods = parse_methods(methods, BENCH_METHODS, BenchError)
    spec, read = check_spec(spec, verifier, draft_model)
    unseen = choose_unseen(prompts, split, shares, limit, read, include_fitted=include_fitted)
    chosen = unseen.prompts

    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.evaluation.bench import BenchSettings, run_bench
    from viasd_calib.evaluation.method_columns import bench_table
    from viasd_calib.evaluation.provenance import PromptsMeasured, note_provenance
    from viasd_calib.hardware import hardware
    from viasd_calib.models import load_verifier

    load = _load or load_verifier
    engine = load_engine(
        spec,
        spec=read,
        verifier=verifier,
        draft_model=draft_model,
        dtype=dtype,
        device=device,
        backend=backend,
        load=load,
    )
    check_prompts(engine.verifier, chosen, max_new_tokens)
    settings = BenchSettings(
        methods=chosen_methods,
        max_new_tokens=max_new_tokens,
        dtype=dtype or engine.spec.verifier.dtype,
        audit=audit or engine.spec.decoding.audit,
        seed=seed,
        backend=engine.backend,
    )
    if "three_tier" in settings.methods:
        notice_uncertified(engine.spec, audit)
    job = {
        "settings": settings.model_dump(mode="json"),
        "spec": file_sha256(Path(spec)),
        "verifier": [verifier, engine.verifier.ref.weights],
        "hardware": hardware(engine.routed.device),
    }
    ledger = ledger_beside(json, job)
    notice_resumed(ledger, "prompts", step_names(chosen))
    result = run_bench(engine, chosen, settings, _plain_verifier(engine, settings), ledger)
    measured = PromptsMeasured(
        file=Path(prompts).name if Path(prompts).exists() else prompts,
        sha256=split_sha256(chosen),
        split=split,
        limit=limit,
        left_out=unseen.left_out,
        fitted_included=include_fitted,
    )
    provenance = note_provenance(read, engine.verifier.ref, measured, command_line.get())
    result = result.model_copy(update={"provenance": provenance})
    write_json(Path(json), result)
    ledger.close()
    console = Console()
    console.print(bench_table(result))
    for task in result.by_task if len(result.by_task) > 1 else ():
        console.print(bench_table(result, task))
    for line in describe_differences(result):
        console.print(line)
    say_written(json)
    refuse_unexplained(result)
    return result


def _plain_verifier(engine: lazy_types.Engine, settings: lazy_types.BenchSettings) -> lazy_types.RoutedModel | None:
    """A second copy of the verifier for transformers' own generate, where the backend has changed the engine's."""
    if "transformers" not in settings.methods or engine.backend == "eager":
        return None
    from viasd_calib.models import DTYPE_NAMES, load_verifier
    from viasd_calib.slim.forward import RoutedModel

    name = engine.verifier.ref.name_or_path  # as it was found
    dtype = DTYPE_NAMES[engine.routed.dtype]
    return RoutedModel(load_verifier(name, dtype=dtype, device=str(engine.routed.device)).model)


def describe_differences(result: lazy_types.BenchResult) -> list[str]:
    """A line for each method of which some text leaves the autoregressive one at a near tie."""
    lines = []
    for name, method in result.methods.items():
        gaps = [abs(found.gap) for found in method.differences if found.gap is not None and found.explained]
        if gaps:
            lines.append(
                f"{name}: {len(gaps)} of {result.n_prompts} prompts leave the autoregressive text where the verifier is"
                f" nearly tied: median gap {median(gaps):.3g}, widest {max(gaps):.3g} ({result.settings.dtype} logits)"
            )
    return lines


def refuse_unexplained(result: lazy_types.BenchResult) -> None:
    """Fail on a lossless method that differs by more than rounding.

    Raises:
        BenchError: naming the first such text.
    """
    from viasd_calib.evaluation.bench import unexplained

    found = unexplained(result)
    if found:
        name, first = found[0]
        gap = "an end of text" if first.gap is None else f"a gap of {first.gap:.3g}"
        raise BenchError(
            f"{name} is lossless, but left the autoregressive text at token {first.place} of {first.prompt_id} by "
            f"{gap}, where rounding explains {first.near_tie:.3g} ({len(found)} such texts); the JSON is written, "
            "please report it"
        )


def report(
    spec: str,
    bench: str,
    out: str,
    calibrate: str | None = None,
    fit: str | None = None,
    prompts: str = EMBEDDED,
    split: Split | None = "test",
    shares: SplitShares | None = None,
    limit: Count = 8,
    include_fitted: bool = False,
    max_new_tokens: Count = 96,
    verifier: str | None = None,
    draft_model: str | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    _load: lazy_types.LoadVerifier | None = None,
) -> None:
    """Write one self-contained HTML page: tables, route, gates, tiers, speed against loss, a text and a round.

    Args:
        spec: path of the routing spec.
        bench: JSON that ``viasd bench`` wrote; it must have measured this spec's policy. A notice says where it
            measured other prompts than those that are decoded here.
        out: path of the page.
        calibrate: folder that ``viasd calibrate`` wrote, for the gates' reliability and the candidates tested.
        fit: where the fit is that was calibrated, if not where it was then.
        prompts: prompts to decode for tier shares and the coloured text.
        split: take this split's prompts alone, by hash; null takes all.
        shares: shares of the splits.
        limit: prompts to decode.
        include_fitted: take in the prompts that the spec was fitted or calibrated on, which are left out by default.
        max_new_tokens: longest answer.
        verifier: where to find the verifier, in place of the name in the spec.
        draft_model: the same for the draft model, where the spec names one.
        dtype: in place of the spec's.
        device: where models run.
    """
    check_out_file("--out", out)
    check_device(device)
    provenance = check_bench("--bench", bench)
    if calibrate is not None:
        check_calibrate_folder("--calibrate", calibrate)
    spec, read = check_spec(spec, verifier, draft_model)
    check_policy(provenance, read, bench)
    unseen = choose_unseen(prompts, split, shares, limit, read, include_fitted=include_fitted)
    chosen = unseen.prompts
    if provenance is not None:
        notice_other_prompts(unseen, provenance.prompts, read, shares, (bench, prompts))

    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.evaluation.bench import load_bench
    from viasd_calib.evaluation.report import ReportInputs, write_report
    from viasd_calib.models import load_verifier

    measured = load_bench(bench)
    engine = load_engine(
        spec,
        spec=read,
        verifier=verifier,
        draft_model=draft_model,
        dtype=dtype,
        device=device,
        load=_load or load_verifier,
    )
    check_prompts(engine.verifier, chosen, max_new_tokens)
    decoder = engine.decoder()
    texts = [generation for prompt in chosen for generation in _decode(engine, decoder, prompt, max_new_tokens)]
    reliability, candidates = _calibration(calibrate, fit)
    inputs = ReportInputs(
        spec=engine.spec,
        bench=measured,
        reliability=reliability,
        tiers=[generation.tiers for generation in texts],
        sample=_sample(engine, chosen[0], texts[0]),
        candidates=candidates,
        rounds=_rounds(engine, chosen[:ROUND_PROMPTS], max_new_tokens),
    )
    write_report(inputs, Path(out))
    say_written(out)


def _decode(
    engine: lazy_types.Engine, decoder: lazy_types.Decoder, prompt: Prompt, max_new_tokens: int
) -> list[lazy_types.Generation]:
    from viasd_calib.decoding.conversation import converse

    return [turn.generation for turn in converse(decoder, engine.verifier, prompt, max_new_tokens)]


def _rounds(
    engine: lazy_types.Engine, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, lazy_types.TypicalRound]:
    """A typical round of each of ``ROUND_METHODS``, from the answers to the first turns of some prompts."""
    from viasd_calib.models import encode_prompt
    from viasd_calib.profiling.recording import RecordedText, typical_round

    texts = [encode_prompt(engine.verifier, prompt, [], max_new_tokens) for prompt in prompts]
    found: dict[str, lazy_types.TypicalRound] = {}
    for name in ROUND_METHODS:
        recorded = [one for text in texts for one in RecordedText(engine, name, text, max_new_tokens).finish().rounds]
        found[name] = typical_round(recorded)
    return found


def _calibration(
    folder: str | None, fit: str | None
) -> tuple[dict[str, lazy_types.Reliability], list[lazy_types.TestedCandidate]]:
    if folder is None:
        return {}, []
    from viasd_calib.calibration.artifacts import CalibrateArtifact, load_fit_of

    calibrated = read_json(CalibrateArtifact, Path(folder) / CALIBRATE_FILE, "viasd calibrate")
    fitted, _ = load_fit_of(calibrated, Path(folder), fit)
    return fitted.reliability, calibrated.tested


def _sample(engine: lazy_types.Engine, prompt: Prompt, generation: lazy_types.Generation) -> lazy_types.SampleText:
    from viasd_calib.evaluation.report import SampleText

    pieces = [str(engine.verifier.tokenizer.decode([token])) for token in generation.tokens]
    return SampleText(prompt.turns[0], pieces, generation.tiers, generation.drafted)
