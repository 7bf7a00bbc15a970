"""Which recipe ``viasd fit`` takes where the user names none: low bits, where this machine has kernels for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viasd_calib.errors import TraceError
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.notices import notice
from viasd_calib.shipped import shipped

LOW_BIT = "configs/fit/low-bit.yaml"
TRAINED = "configs/fit/quick.yaml"
ANY_RECIPE = ("model.verifier", "model.memory")
"""Options of a slim verifier that fit any recipe; others say that the user means one of their own."""
TRAINING = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "rounds", "ckpt_path")
"""Options that mean that something is to be trained."""


def default_recipe(given: Mapping[str, Any]) -> str | None:
    """The configuration of ``viasd fit`` for options that name no recipe, with a notice; None where they mean one, or
    where nothing here has kernels for low bits of the verifier that the traces are of.

    Args:
        given: options by their names with dots, those of configurations among them.
    """
    own = [name for name in given if name.startswith("model.") and name not in ANY_RECIPE]
    if own or any(name in given for name in TRAINING):
        return None
    if not low_bits_run(_architecture(given.get("data.folders"))):
        return None
    notice(
        f"no --config: takes {LOW_BIT}, all sublayers in 8 bits and nothing trained, for which this machine has "
        f"kernels; --config {TRAINED} trains a slim verifier that leaves layers out"
    )
    return shipped(LOW_BIT)


def recipe_for(verifier: lazy_types.Verifier) -> str:
    """The configuration of ``viasd fit`` for a verifier, where the user names none."""
    return LOW_BIT if low_bits_run(verifier.ref.architecture) else TRAINED


def low_bits_run(architecture: str | None) -> bool:
    """Whether this machine has kernels for low bits of such a verifier: on its CPU, or on CUDA.

    Args:
        architecture: class of the model in transformers; None where it is not known.
    """
    import torch

    from viasd_calib.slim.low_bit_kernel import why_no_triton_kernel
    from viasd_calib.slim.native.library import why_no_kernels
    from viasd_calib.slim.native.stack import FAMILIES

    if torch.cuda.is_available() and why_no_triton_kernel(torch.device("cuda"), torch.bfloat16) is None:
        return True
    known = architecture is None or architecture.lower() in {f"{family}forcausallm" for family in FAMILIES}
    return known and why_no_kernels(torch.device("cpu"), torch.bfloat16) is None


def _architecture(folders: object) -> str | None:
    """That of the verifier whose traces lie in the first folder; None where that does not say."""
    from viasd_calib.traces.folder import read_manifest

    if not isinstance(folders, list) or not folders:
        return None
    try:
        found = read_manifest(Path(str(folders[0]))).verifier
    except TraceError:  # the fit itself refuses them
        return None
    return found.architecture
