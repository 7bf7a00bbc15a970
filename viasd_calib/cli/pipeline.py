"""``viasd run``: the main job, one step after the other, each as its own command would do it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from viasd_calib.choices import FRACTIONS, SMOLLM2, StrategyName
from viasd_calib.cli.bench import bench
from viasd_calib.cli.calibrate import calibrate
from viasd_calib.cli.capture import capture
from viasd_calib.cli.configurations import flattened, read_configuration
from viasd_calib.cli.export import export, record_evidence, validate
from viasd_calib.cli.fit import fit
from viasd_calib.cli.fit_options import check_given
from viasd_calib.cli.generate import answer, command_line_prompt
from viasd_calib.cli.notices import announce
from viasd_calib.cli.report import report
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE
from viasd_calib.files import read_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.calibrate import WORTH_PROMPTS, WORTH_TOKENS, refuse_too_few
from viasd_calib.pipeline.checks import check_draft, check_model, check_out_folder
from viasd_calib.pipeline.loading import SharedVerifiers
from viasd_calib.pipeline.numbers import Count, Inside, Share
from viasd_calib.pipeline.options import (
    BenchOptions,
    CalibrateOptions,
    CaptureOptions,
    ExportOptions,
    GenerateOptions,
    ReportOptions,
)
from viasd_calib.pipeline.prompt_choice import check_limit, of_split, take_turns
from viasd_calib.prompt_copies import without_copies
from viasd_calib.prompts import EMBEDDED, Prompt, draw_prompts, read_prompts
from viasd_calib.shipped import shipped_configuration
from viasd_calib.spec import DType, load_spec

REPORT_PROMPTS, REPORT_TOKENS = 8, 96
"""Prompts that the report decodes, and tokens of their answers."""


class CaptureStep(BaseModel):
    """Options of the capture step."""

    model_config = ConfigDict(extra="forbid")
    limit: Count | None = None
    max_new_tokens: Count = 64
    batch_size: Count = 32


class CalibrateStep(BaseModel):
    """Options of the calibrate step."""

    model_config = ConfigDict(extra="forbid")
    max_loss: Inside = 0.02
    confidence: Inside = 0.95
    limit: Count | None = None
    max_new_tokens: Count = 32
    fractions: list[Share] = list(FRACTIONS)
    allow_uncertified: bool = False


class BenchStep(BaseModel):
    """Options of the bench step."""

    model_config = ConfigDict(extra="forbid")
    limit: Count | None = 10
    max_new_tokens: Count = 64


def run(
    out: str,
    fit_config: str,
    verifier: str = SMOLLM2,
    draft: str = "prompt_lookup",
    prompts: str = EMBEDDED,
    capture_step: CaptureStep | None = None,
    calibrate_step: CalibrateStep | None = None,
    bench_step: BenchStep | None = None,
    dtype: DType | Literal["auto"] = "float32",
    sample_prompt: str = "Explain in three sentences why the sky is blue.",
) -> None:
    """The main job: capture, fit, calibrate, export, validate, bench, report, generate.

    Capture, fit and calibrate are not done again where their results are there, and the verifier is loaded once.

    Args:
        out: folder for everything.
        fit_config: configuration of ``viasd fit``.
        verifier: hub id, folder, .gguf file or "smollm2-135m".
        draft: drafter, as ``viasd capture`` takes it.
        prompts: prompt file (JSONL or another: see README), NAME:SPLIT of a data set of the hub, or "embedded" for the
            package's own.
        capture_step: options of the capture step.
        calibrate_step: options of the calibrate step.
        bench_step: options of the bench step.
        dtype: number format to calibrate and decode in; "auto" is bfloat16 where the CPU calculates in it, else
            float32. Traces and training are in float32.
        sample_prompt: a prompt to answer at the end, coloured by tier.
    """
    check_out_folder("--out", out)
    command_line_prompt(sample_prompt, option="--sample-prompt")
    every = without_copies(read_prompts(prompts))
    captured, decided = capture_step or CaptureStep(), calibrate_step or CalibrateStep()
    benched = bench_step or BenchStep()
    chosen = prompts_of_steps(every, captured, decided, benched)
    refuse_too_few(len(chosen[1][0]), decided.max_loss, decided.confidence, decided.allow_uncertified)
    check_draft(draft)
    check_model(verifier)
    fit_config = shipped_configuration(fit_config)
    check_given(flattened(read_configuration(fit_config, "--fit-config")))

    folder = Path(out)
    traces, fitted, calibrated = folder / "traces", folder / "fit", folder / "calibrate"
    spec, measured = folder / "spec" / "routing.json", folder / "bench.json"
    load = SharedVerifiers()
    common: dict[str, Any] = {"verifier": verifier, "prompts": prompts}
    chosen_dtype = _dtype_of(dtype)
    refuse_overlong(load(verifier), chosen)

    announce("1/7 capture: what the verifier and the draft model say on the fit prompts")
    capture(CaptureOptions(out=str(traces), draft=draft, **common, **captured.model_dump()), load)
    announce("2/7 fit: route, adapter and first gates")
    if not (fitted / FIT_FILE).is_file():
        fit([
            "--config", fit_config, "--out", str(fitted), "--model.verifier", verifier,
            "--data.folders", f"[{traces}]", "--trainer.default_root_dir", str(fitted),
        ], _load=load)  # fmt: skip
    announce("3/7 calibrate: bounds for the gates, certified on the calibrate prompts")
    if not (calibrated / CALIBRATE_FILE).is_file():
        certify = CalibrateOptions(
            fit=str(fitted), out=str(calibrated), dtype=chosen_dtype, **common, **decided.model_dump()
        )
        calibrate(certify, load)
    announce("4/7 export and validate the routing spec")
    export(ExportOptions(calibrate=str(calibrated), out=str(spec), verifier=verifier, dtype=chosen_dtype), load)
    validate(str(spec))
    announce("5/7 bench: autoregressive, speculative and three-tier on test prompts")
    bench(BenchOptions(spec=str(spec), json=str(measured), split="test", **common, **benched.model_dump()), load)
    record_evidence(str(spec), str(measured))
    announce("6/7 report")
    page = ReportOptions(
        spec=str(spec),
        bench=str(measured),
        out=str(folder / "report.html"),
        calibrate=str(calibrated),
        limit=REPORT_PROMPTS,
        max_new_tokens=REPORT_TOKENS,
        **common,
    )
    report(page, load)
    announce("7/7 generate")
    best, sentences = _concluded(spec, measured, calibrated / CALIBRATE_FILE)
    asked = GenerateOptions(
        spec=str(spec),
        prompt=sample_prompt,
        max_new_tokens=64,
        method=best,
        show_tiers=best == "three_tier",
        verifier=verifier,
    )
    answer(asked, load)
    Console().print(f"\nspec: {spec}\nreport: {folder / 'report.html'}\nbenchmark: {measured}\n")
    for sentence in sentences:
        Console(highlight=False).print(sentence)


def _concluded(spec: Path, measured: Path, calibrated: Path) -> tuple[StrategyName, list[str]]:
    """The strategy to decode with, and what benchmark and calibration come to in words."""
    from viasd_calib.calibration.artifacts import CalibrateArtifact
    from viasd_calib.evaluation.bench import load_bench
    from viasd_calib.evaluation.conclusion import conclusion, recommended_method

    result = load_bench(measured)
    timing = read_json(CalibrateArtifact, calibrated, "viasd calibrate").slim_worth
    return recommended_method(result), conclusion(result, load_spec(spec), timing)


def _dtype_of(dtype: DType | Literal["auto"]) -> DType:
    """The number format that is meant."""
    if dtype != "auto":
        return dtype
    import torch

    from viasd_calib.slim.backends import fastest_dtype

    return fastest_dtype(torch.device("cpu"))


def prompts_of_steps(
    every: Sequence[Prompt], captured: CaptureStep, calibrated: CalibrateStep, benched: BenchStep
) -> list[tuple[list[Prompt], int]]:
    """What each step answers, and how many new tokens it allows, so that it can be checked before the first.

    Raises:
        PromptError: a step has no prompts.
    """
    for step in (captured, calibrated, benched):
        check_limit(step.limit)
    test = of_split(every, "test", None, say=False)
    decided = draw_prompts(of_split(every, "calibrate", None, say=False), calibrated.limit)
    return [
        (draw_prompts(of_split(every, "fit", None, say=False), captured.limit), captured.max_new_tokens),
        (decided, calibrated.max_new_tokens),
        (draw_prompts(decided, WORTH_PROMPTS), max(calibrated.max_new_tokens, WORTH_TOKENS)),
        (take_turns(test, benched.limit), benched.max_new_tokens),
        (take_turns(test, REPORT_PROMPTS), REPORT_TOKENS),
    ]


def refuse_overlong(verifier: lazy_types.Verifier, chosen: Sequence[tuple[list[Prompt], int]]) -> None:
    """Refuse the prompts of all steps that do not fit the verifier's context, together.

    Raises:
        PromptError: naming the first few.
    """
    from viasd_calib.prompt_lengths import LengthCheck, look_at_lengths

    found = [look_at_lengths(verifier, prompts, max_new_tokens) for prompts, max_new_tokens in chosen]
    # A prompt may be of several steps: the first one's reason is said.
    refused = dict(one for check in reversed(found) for one in check.refused)
    LengthCheck(len({prompt.id for prompts, _ in chosen for prompt in prompts}), [*refused.items()], []).raise_refused()
