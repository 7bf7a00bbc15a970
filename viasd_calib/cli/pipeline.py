"""``viasd run``: the main job, one step after the other, each as its own command would do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from viasd_calib.choices import FRACTIONS, SMOLLM2
from viasd_calib.cli.calibrate import calibrate
from viasd_calib.cli.capture import capture
from viasd_calib.cli.checks import check_out_folder
from viasd_calib.cli.evaluate import bench, report
from viasd_calib.cli.export import export, record_evidence, validate
from viasd_calib.cli.fit import fit
from viasd_calib.cli.generate import answer
from viasd_calib.cli.loading import SharedVerifiers
from viasd_calib.cli.notices import announce
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE
from viasd_calib.prompts import EMBEDDED, read_prompts


class CaptureStep(BaseModel):
    """Options of the capture step."""

    model_config = ConfigDict(extra="forbid")
    limit: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 32


class CalibrateStep(BaseModel):
    """Options of the calibrate step."""

    model_config = ConfigDict(extra="forbid")
    max_loss: float = 0.02
    confidence: float = 0.95
    limit: int | None = None
    max_new_tokens: int = 32
    fractions: list[float] = list(FRACTIONS)


class BenchStep(BaseModel):
    """Options of the bench step."""

    model_config = ConfigDict(extra="forbid")
    limit: int | None = 10
    max_new_tokens: int = 64


def run(
    out: str,
    fit_config: str,
    verifier: str = SMOLLM2,
    draft: str = "prompt_lookup",
    prompts: str = EMBEDDED,
    capture_step: CaptureStep | None = None,
    calibrate_step: CalibrateStep | None = None,
    bench_step: BenchStep | None = None,
    sample_prompt: str = "Explain in three sentences why the sky is blue.",
) -> None:
    """The main job: capture, fit, calibrate, export, validate, bench, report, generate.

    Capture, fit and calibrate are not done again where their results are there, and the verifier is loaded once.

    Args:
        out: folder for everything.
        fit_config: configuration of ``viasd fit``.
        verifier: hub id, folder, .gguf file or "smollm2-135m".
        draft: drafter, as ``viasd capture`` takes it.
        prompts: prompt file (JSONL), or "embedded" for the package's own.
        capture_step: options of the capture step.
        calibrate_step: options of the calibrate step.
        bench_step: options of the bench step.
        sample_prompt: a prompt to answer at the end, coloured by tier.
    """
    check_out_folder("--out", out)
    read_prompts(prompts)

    folder = Path(out)
    traces, fitted, calibrated = folder / "traces", folder / "fit", folder / "calibrate"
    spec, measured = folder / "spec" / "routing.json", folder / "bench.json"
    load = SharedVerifiers()
    common: dict[str, Any] = {"verifier": verifier, "prompts": prompts, "_load": load}

    announce("1/7 capture: what the verifier and the draft model say on the fit prompts")
    capture(out=str(traces), draft=draft, **common, **(capture_step or CaptureStep()).model_dump())
    announce("2/7 fit: route, adapter and first gates")
    if not (fitted / FIT_FILE).is_file():
        fit([
            "--config", fit_config, "--out", str(fitted), "--model.verifier", verifier,
            "--data.folders", f"[{traces}]", "--trainer.default_root_dir", str(fitted),
        ], _load=load)  # fmt: skip
    announce("3/7 calibrate: bounds for the gates, certified on the calibrate prompts")
    if not (calibrated / CALIBRATE_FILE).is_file():
        step = calibrate_step or CalibrateStep()
        calibrate(fit=str(fitted), out=str(calibrated), **common, **step.model_dump())
    announce("4/7 export and validate the routing spec")
    export(calibrate=str(calibrated), out=str(spec), verifier=verifier, _load=load)
    validate(str(spec))
    announce("5/7 bench: autoregressive, speculative and three-tier on test prompts")
    bench(spec=str(spec), json=str(measured), split="test", **common, **(bench_step or BenchStep()).model_dump())
    record_evidence(str(spec), str(measured))
    announce("6/7 report")
    report(
        spec=str(spec),
        bench=str(measured),
        out=str(folder / "report.html"),
        calibrate=str(calibrated),
        **common,
    )
    announce("7/7 generate")
    answer(spec=str(spec), prompt=sample_prompt, max_new_tokens=64, show_tiers=True, verifier=verifier, _load=load)
    Console().print(f"\nspec: {spec}\nreport: {folder / 'report.html'}\nbenchmark: {measured}")
