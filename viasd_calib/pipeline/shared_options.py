"""What the options of several jobs share, and how a class of options is made.

Annotations are evaluated here, not postponed, since the parser of a command reads the ranges of numbers off them.
"""

import inspect
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from viasd_calib.choices import Backend, OffloadChoice
from viasd_calib.option_types import Count, check_options
from viasd_calib.prompts import EMBEDDED, Split, SplitShares
from viasd_calib.spec import DType

Options = TypeVar("Options")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(kind: type[Options]) -> type[Options]:
    """A frozen dataclass of keywords whose docstring also describes what it inherits.

    What an annotation does not allow is a :class:`~viasd_calib.errors.UsageError`.
    """
    documented = (inspect.cleandoc(base.__doc__ or "") for base in kind.__bases__ if base is not object)
    summary, _, own = inspect.cleandoc(kind.__doc__ or "").partition("\n\nArgs:\n")
    inherited = (text.partition("\n\nArgs:\n")[2] for text in documented)  # before its own, which may describe it anew
    kind.__doc__ = "\n".join([f"{summary}\n\nArgs:", *inherited, own])
    if "__post_init__" not in vars(kind):
        untyped: Any = kind
        untyped.__post_init__ = check_options
    return dataclass(frozen=True, kw_only=True)(kind)


@options
class Models:
    """Where models are found and run.

    Args:
        verifier: where to find the verifier, in place of the name that the input has for it.
        device: where models run.
    """

    verifier: str | None = None
    device: str = "cpu"


@options
class OffloadOptions:
    """How much of the verifier is in memory.

    Args:
        offload: read layers that the slim verifier does not run for each pass of the full one: from disk, or, on CUDA,
            from the host's memory (cpu); none has all in memory; what the spec says where it is left out.
        memory: with offload, what weights may take in memory, as 300MB or 2GiB: the more, the fewer layers are read;
            as little as can be where it is left out.
        bandwidth: with offload, bytes a second that reading is slowed down to, as 500MB: simulates a slower disk.
    """

    offload: OffloadChoice | None = None
    memory: int | str | None = None
    bandwidth: int | str | None = None


@options
class FitModels(Models):
    """The same, where there is no spec yet.

    Args:
        draft_model: where to find the draft model, in place of its name, where there is one.
        dtype: number format of the verifier; where it is left out that of the spec, if there is one, else bfloat16
            where the device calculates in it, and float32 where it does not.
    """

    draft_model: str | None = None
    dtype: DType | None = None


@options
class FittedModels(Models):
    """The same, of a fit.

    Args:
        draft_model: where to find the draft model, in place of its name in the fit.
    """

    draft_model: str | None = None
    dtype: DType | None = None


@options
class SpecModels(Models):
    """The same, of a routing spec.

    Args:
        spec: path of the routing spec.
        draft_model: where to find the draft model, in place of its name, where the spec names one.
        dtype: number format, in place of the spec's.
    """

    spec: str
    draft_model: str | None = None
    dtype: DType | None = None


@options
class BackendModels(OffloadOptions, SpecModels):
    """The same, by a backend.

    Args:
        backend: what runs models: native (bfloat16 on a CPU with AVX2 or AVX-512), packed (a CPU), eager, or
            compiled (minutes to compile first); where it is left out, the first of these that can run here.
    """

    backend: Backend | None = None


@options
class PromptSource:
    """Which prompts a job takes.

    Args:
        prompts: prompt file (JSONL or another: see docs/guide/prompts.md), NAME:SPLIT of a data set of the hub, or
            "embedded" for the package's own.
        shares: shares of the splits.
        limit: take this many of the prompts that are left by split and exclusions; null takes all.
    """

    prompts: str = EMBEDDED
    shares: SplitShares | None = None
    limit: Count | None = None


@options
class UnseenPrompts(PromptSource):
    """The same, of prompts that a spec was not made from.

    Args:
        split: take this split's prompts alone, by hash; null takes all.
        include_fitted: take in the prompts that the spec was fitted or calibrated on, which are left out by default.
        max_new_tokens: longest answer.
    """

    split: Split | None = None
    include_fitted: bool = False
    max_new_tokens: Count = 128
