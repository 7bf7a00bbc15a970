"""A fit of gates alone: nothing of the verifier is trained, so q' and q run as they will decode.

The number format, the kernels and the way in which layers are read are those of decoding; so what the gates learn from
is what they will be asked about, and a fit takes little more memory than decoding does.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from lightning import seed_everything

from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.calibration.gate_fitting import FittedGates, fit_gates
from viasd_calib.calibration.scoring import at_once, run_by_run
from viasd_calib.errors import CalibrationError
from viasd_calib.host_memory import freed_memory_goes_back
from viasd_calib.models import LoadVerifier
from viasd_calib.pipeline.fit_memory import offload_entry
from viasd_calib.pipeline.fit_once import gate_texts, write_result
from viasd_calib.pipeline.fit_options import FitOptions
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.backends import fastest_dtype
from viasd_calib.slim.decoding_copy import cost_of
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_ready
from viasd_calib.slim.low_bit import WIDENED_BYTES
from viasd_calib.slim.offload.settings import Offload, check_offload
from viasd_calib.slim.parts.base import FitInputs, fit_parts, save_parts
from viasd_calib.spec import Route
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.folder import refuse_other_verifier
from viasd_calib.training.distillation import check_memory


def gates_alone(options: FitOptions) -> bool:
    """Whether a fit on this machine is of gates alone: as asked by ``offload``, or in one process on a CPU."""
    if options.offload is not None:
        return True
    single = options.trainer.get("devices", 1) in (1, "1", "auto") and options.trainer.get("num_nodes", 1) == 1
    return single and not torch.cuda.is_available() and _needs_training(options) is None


def _needs_training(options: FitOptions) -> str | None:
    """What is trained, or chosen by passes of a verifier in memory, in words; None where nothing is."""
    model = options.model
    needs = {
        f"--model.route_choice {model.route_choice}": model.route_choice != "whole",
        "an adapter (--model.adapter_rank 0 leaves it out)": model.rank != 0,
        f"--model.mlp_keep {model.mlp_keep:g}": model.mlp_keep < 1,
        f"--model.head_vocab {model.head_vocab}": bool(model.head_vocab),
        "--model.parts other than low_bit": [*model.parts] != ["low_bit"],
        "bits auto": model.parts.get("low_bit", {}).get("bits") == "auto",
        "--rounds": options.rounds != 1,
        "--ckpt_path": options.ckpt_path is not None,
    }
    return next((name for name, asked in needs.items() if asked), None)


def check_streamed(options: FitOptions) -> None:
    """Refuse what cannot be fitted with layers read for each pass, before anything is loaded.

    Raises:
        CalibrationError: something is trained, chosen or rounded by passes of a verifier in memory.
        ModelError: the system cannot read layers so.
    """
    learned = options.model.parts.get("low_bit", {}).get("rounding") == "gptq"
    found = _needs_training(options) or ("rounding gptq" if learned else None)
    if found is not None:
        raise CalibrationError(
            "--offload fits gates alone, with the verifier's layers read for each of its passes, and "
            f"{found} needs them in memory; take --config fit/low-bit, or leave out --offload"
        )
    if options.offload == "cpu":
        raise CalibrationError("--offload cpu keeps all layers in memory; give --offload disk, or leave it out")
    check_offload(Offload("disk"), "cpu", None)


def fit_gates_alone(options: FitOptions, load: LoadVerifier) -> FitArtifact:
    """Fit the first gates of a slim verifier in low bits, on the CPU.

    Where ``offload`` is "disk", q's layers are read for each of its passes: in memory are those of q', and what both
    share.

    Raises:
        ViasdError: options or traces that cannot be.
    """
    if options.seed is not None:
        seed_everything(options.seed, workers=True)
    data, out = options.data, Path(options.out)
    data.setup()
    compared = gate_texts(options.gate_folders, data.seed) if options.gate_folders else data
    route, gates = _gates(options, load, data, compared, out)
    return write_result(route, data, compared, gates, 0.0, out, offload_entry(options))


def _gates(
    options: FitOptions, load: LoadVerifier, data: TraceDataModule, compared: TraceDataModule, out: Path
) -> tuple[Route, FittedGates]:
    """The route, which its options give, with its cost as it will decode; and gates by what it would have said."""
    offload = None if options.offload is None else Offload("disk")
    dtype = fastest_dtype(torch.device("cpu"))
    verifier = load(options.model.verifier, dtype=dtype, layers=offload is None)
    refuse_other_verifier(data.verifier_ref(), verifier.ref)
    inputs = FitInputs(RoutedModel(verifier.model), Route(), data.training_texts(), read_residuals)
    held = fit_parts(inputs, options.model.further_options)
    route = save_parts(Route(), held, options.model.part_options, out)
    routed = load_ready(verifier.model, route, out, offload)
    check_memory(routed.memory, options.model.memory)
    with nullcontext() if offload is None else freed_memory_goes_back():
        gates = fit_gates(
            routed, compared.training_texts(), compared.validation_texts(), options.model.max_run,
            widened_bytes=WIDENED_BYTES if offload is None else 0,
            read=run_by_run if routed.integer_kernels else at_once,
        )  # fmt: skip
    return route.model_copy(update={"memory": routed.memory, "relative_cost": cost_of(routed)}), gates
