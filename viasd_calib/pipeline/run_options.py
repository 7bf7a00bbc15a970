"""The options of the main job, whose steps have some of their own."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from viasd_calib.choices import FRACTIONS, SMOLLM2
from viasd_calib.option_types import Count, DraftLength, Inside, MaxPending, Share
from viasd_calib.pipeline.shared_options import options
from viasd_calib.prompts import EMBEDDED
from viasd_calib.spec import DType


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
    draft_length: DraftLength = 6
    max_pending: MaxPending = 24


class BenchStep(BaseModel):
    """Options of the bench step."""

    model_config = ConfigDict(extra="forbid")
    limit: Count | None = 10
    max_new_tokens: Count = 64


class OffloadStep(BaseModel):
    """Options of a second benchmark, of a spec whose layers are read for each pass of the verifier.

    Attributes:
        spec: for the same verifier, which was calibrated with offload.
    """

    model_config = ConfigDict(extra="forbid")
    spec: str
    limit: Count | None = 6
    max_new_tokens: Count = 32


@options
class RunOptions:
    """The main job: capture, fit, calibrate, export, validate, bench, report, generate.

    Args:
        out: folder for everything.
        fit_config: of ``viasd fit``; left out, fit/low-bit where this machine has kernels for low bits, else fit/quick.
        verifier: hub id, folder, .gguf file or "smollm2-135m".
        draft: drafter, as ``viasd capture`` takes it.
        prompts: prompt file (JSONL or another: see docs/guide/prompts.md), NAME:SPLIT of a data set of the hub, or
            "embedded" for the package's own.
        capture_step: options of the capture step.
        calibrate_step: options of the calibrate step.
        bench_step: options of the bench step.
        offload_step: spec and options of a second benchmark, with the verifier's layers read for each pass; the results
            of both are the last two lines. None where it is left out.
        dtype: number format to calibrate and decode in; "auto" is bfloat16 where the CPU calculates in it, else
            float32. Where it is left out ``viasd calibrate`` chooses. Traces and training are in float32.
        sample_prompt: a prompt to answer at the end, coloured by tier.
    """

    out: str
    fit_config: str | None = None
    verifier: str = SMOLLM2
    draft: str = "prompt_lookup"
    prompts: str = EMBEDDED
    capture_step: CaptureStep | None = None
    calibrate_step: CalibrateStep | None = None
    bench_step: BenchStep | None = None
    offload_step: OffloadStep | None = None
    dtype: DType | Literal["auto"] | None = None
    sample_prompt: str = "Explain in three sentences why the sky is blue."
