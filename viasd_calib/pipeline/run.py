"""The main job: one step after the other, each as its own command would do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from viasd_calib.choices import StrategyName
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE
from viasd_calib.files import read_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.calibrate import TIMED_PROMPTS, TIMED_TOKENS, refuse_too_few
from viasd_calib.pipeline.checks import check_draft, check_model, check_out_folder
from viasd_calib.pipeline.generate import command_line_prompt
from viasd_calib.pipeline.loading import SharedVerifiers
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.options import (
    BenchOptions,
    CalibrateOptions,
    CaptureOptions,
    ExportOptions,
    GenerateOptions,
    ReportOptions,
)
from viasd_calib.pipeline.prompt_choice import check_limit, of_split, take_turns
from viasd_calib.pipeline.recipes import recipe_for
from viasd_calib.pipeline.run_options import BenchStep, CalibrateStep, CaptureStep, RunOptions
from viasd_calib.prompt_copies import without_copies
from viasd_calib.prompts import Prompt, draw_prompts, read_prompts
from viasd_calib.shipped import shipped, shipped_configuration
from viasd_calib.spec import DType, load_spec

REPORT_PROMPTS, REPORT_TOKENS = 8, 96
"""Prompts that the report decodes, and tokens of their answers."""


@dataclass(frozen=True)
class Jobs:
    """The functions that do the steps; the command line's print what they come to.

    Attributes:
        check_fit: refuses the configuration of a fit that cannot be, before anything is done.
        fit: takes the words of ``viasd fit``.
        announce: is told which step begins.
        conclude: is told the folder of the results, and what they come to in words.
    """

    check_fit: Callable[[str], None]
    capture: Callable[[CaptureOptions, SharedVerifiers], object]
    fit: Callable[[Sequence[str], SharedVerifiers], object]
    calibrate: Callable[[CalibrateOptions, SharedVerifiers], object]
    export: Callable[[ExportOptions, SharedVerifiers], object]
    validate: Callable[[str], object]
    bench: Callable[[BenchOptions, SharedVerifiers], object]
    record_evidence: Callable[[str, str], object]
    report: Callable[[ReportOptions, SharedVerifiers], object]
    answer: Callable[[GenerateOptions, SharedVerifiers], object]
    announce: Callable[[str], None]
    conclude: Callable[[RunPlaces, Sequence[str]], None]


@dataclass(frozen=True)
class RunPlaces:
    """Where the results of a run lie."""

    folder: Path

    @property
    def spec(self) -> Path:
        """The routing spec."""
        return self.folder / "spec" / "routing.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    @property
    def bench(self) -> Path:
        """The benchmark's JSON."""
        return self.folder / "bench.json"

    @property
    def offload_bench(self) -> Path:
        """That of a spec whose layers are read for each pass."""
        return self.folder / "bench_offload.json"


def run(options: RunOptions, jobs: Jobs) -> None:
    """Capture, fit, calibrate, export, validate, bench, report and answer a prompt.

    Capture, fit and calibrate are not done again where their results are there, and the verifier is loaded once.

    Raises:
        ViasdError: options of any step that cannot be, before the first one.
    """
    check_out_folder("--out", options.out)
    command_line_prompt(options.sample_prompt, option="--sample-prompt")
    every = without_copies(read_prompts(options.prompts))
    captured, decided = options.capture_step or CaptureStep(), options.calibrate_step or CalibrateStep()
    benched = options.bench_step or BenchStep()
    chosen = prompts_of_steps(every, captured, decided, benched)
    refuse_too_few(  # as a first attempt; calibrate counts earlier ones
        len(chosen[1][0]), decided.max_loss, decided.confidence, decided.allow_uncertified, attempt=1
    )
    check_draft(options.draft)
    check_model(options.verifier)
    second = options.offload_step
    if second is not None:
        load_spec(shipped(second.spec))
    if options.fit_config is not None:
        jobs.check_fit(shipped_configuration(options.fit_config))

    places = RunPlaces(Path(options.out))
    traces, fitted, calibrated = (places.folder / name for name in ("traces", "fit", "calibrate"))
    load = SharedVerifiers()
    common: dict[str, Any] = {"verifier": options.verifier, "prompts": options.prompts}
    dtype = _dtype_of(options.dtype)
    verifier = load(options.verifier)
    refuse_overlong(verifier, chosen)
    fit_config = shipped_configuration(options.fit_config or recipe_for(verifier))

    jobs.announce("1/7 capture: what the verifier and the draft model predict on the fit prompts")
    # The gates are fitted at the places in a block at which they will be asked; a block of 0 is none.
    blocks = max(decided.draft_length, 1)
    logged = {**common, **captured.model_dump(), "draft_length": blocks, "dtype": dtype}
    jobs.capture(CaptureOptions(out=str(traces), draft=options.draft, **logged), load)
    jobs.announce("2/7 fit: route, adapter and first gates")
    if not (fitted / FIT_FILE).is_file():
        words = ["--config", fit_config, "--out", str(fitted), "--model.verifier", options.verifier]
        words += ["--data.folders", f"[{traces}]", "--trainer.default_root_dir", str(fitted)]
        jobs.fit(words, load)
    jobs.announce("3/7 calibrate: thresholds for the gates, certified on the calibrate prompts")
    if not (calibrated / CALIBRATE_FILE).is_file():
        step = CalibrateOptions(fit=str(fitted), out=str(calibrated), dtype=dtype, **common, **decided.model_dump())
        jobs.calibrate(step, load)
    jobs.announce("4/7 export and validate the routing spec")
    spec = str(places.spec)
    jobs.export(ExportOptions(calibrate=str(calibrated), out=spec, verifier=options.verifier, dtype=dtype), load)
    jobs.validate(spec)
    jobs.announce("5/7 bench: autoregressive, speculative and three-tier on test prompts")
    jobs.bench(BenchOptions(spec=spec, json=str(places.bench), split="test", **common, **benched.model_dump()), load)
    jobs.record_evidence(spec, str(places.bench))
    read = second is not None and _can_read()
    if second is not None and read:
        jobs.announce(f"5/7 bench, with the verifier's layers read for each pass: {second.spec}")
        again = BenchOptions(json=str(places.offload_bench), split="test", **common, **second.model_dump())
        jobs.bench(again, load)
    jobs.announce("6/7 report")
    page = ReportOptions(
        spec=spec,
        bench=str(places.bench),
        out=str(places.report),
        calibrate=str(calibrated),
        limit=REPORT_PROMPTS,
        max_new_tokens=REPORT_TOKENS,
        **common,
    )
    jobs.report(page, load)
    jobs.announce("7/7 generate")
    best, sentences = _concluded(places, calibrated / CALIBRATE_FILE, with_offload=read)
    asked = GenerateOptions(
        spec=spec,
        prompt=options.sample_prompt,
        max_new_tokens=64,
        method=best,
        show_tiers=best == "three_tier",
        verifier=options.verifier,
    )
    jobs.answer(asked, load)
    jobs.conclude(places, sentences)


def _can_read() -> bool:
    """Whether layers can be read for each pass on this system; a notice says why not."""
    from viasd_calib.slim.offload.settings import why_no_reading

    lacking = why_no_reading()
    if lacking is not None:
        notice(f"nothing is measured with layers read for each pass: {lacking}")
    return lacking is None


def _concluded(places: RunPlaces, calibrated: Path, *, with_offload: bool) -> tuple[StrategyName, list[str]]:
    """The strategy to decode with, and what benchmark and calibration come to in words."""
    from viasd_calib.calibration.artifacts import CalibrateArtifact
    from viasd_calib.evaluation.bench import load_bench
    from viasd_calib.evaluation.conclusion import conclusion, in_one_line, recommended_method

    result = load_bench(places.bench)
    timing = read_json(CalibrateArtifact, calibrated, "viasd calibrate").slim_worth
    sentences = conclusion(result, load_spec(places.spec), timing)
    if with_offload:
        sentences += ["", in_one_line(result), in_one_line(load_bench(places.offload_bench))]
    return recommended_method(result), sentences


def _dtype_of(dtype: DType | Literal["auto"] | None) -> DType | None:
    """The number format that is meant; None for the one that calibration chooses."""
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
        (draw_prompts(decided, TIMED_PROMPTS), max(calibrated.max_new_tokens, TIMED_TOKENS)),
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
    # A prompt may be of several steps: the first one's reason is given.
    refused = dict(one for check in reversed(found) for one in check.refused)
    LengthCheck(len({prompt.id for prompts, _ in chosen for prompt in prompts}), [*refused.items()], []).raise_refused()
