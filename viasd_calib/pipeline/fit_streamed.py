"""A fit of gates alone on a verifier whose layers are read for each of its passes: nothing of it is trained."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from lightning import seed_everything

from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.calibration.gate_fitting import FittedGates, fit_gates
from viasd_calib.errors import CalibrationError
from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.models import LoadVerifier
from viasd_calib.pipeline.fit_memory import offload_entry
from viasd_calib.pipeline.fit_once import gate_texts, write_result
from viasd_calib.pipeline.fit_options import FitOptions
from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.backends import fastest_dtype
from viasd_calib.slim.decoding_copy import cost_of
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.loading import load_ready, load_routed
from viasd_calib.slim.offload.install import stream_layers
from viasd_calib.slim.offload.settings import Offload, check_offload
from viasd_calib.slim.parts.base import FitInputs, fit_parts, save_parts
from viasd_calib.spec import RelativeCost, Route
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.traces.folder import refuse_other_verifier
from viasd_calib.training.distillation import check_memory

HELD_WIDENED = 0
"""Bytes of low-bit weights that are held in float32 while texts are scored: none, where memory is little."""


def check_streamed(options: FitOptions) -> None:
    """Refuse what cannot be fitted with layers read for each pass, before anything is loaded.

    Raises:
        CalibrationError: something is trained, or chosen by passes of a verifier in memory.
        ModelError: the system cannot read layers so.
    """
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
    found = next((name for name, asked in needs.items() if asked), None)
    if found is not None:
        raise CalibrationError(
            "--offload fits gates alone, with the verifier's layers read for each of its passes, and "
            f"{found} needs them in memory; take --config fit/low-bit, or leave out --offload"
        )
    if options.offload == "cpu":
        raise CalibrationError("--offload cpu keeps all layers in memory; give --offload disk, or leave it out")
    check_offload(Offload("disk"), "cpu", None)


def fit_streamed(options: FitOptions, load: LoadVerifier) -> FitArtifact:
    """Fit the first gates of a slim verifier in low bits, with no more in memory than that and what it shares with q.

    All is calculated in float32 on the CPU, as a fit in memory calculates it, and gives the same gates.

    Raises:
        ViasdError: options or traces that cannot be.
    """
    check_streamed(options)
    if options.seed is not None:
        seed_everything(options.seed, workers=True)
    data, out = options.data, Path(options.out)
    data.setup()
    compared = gate_texts(options.gate_folders, data.seed) if options.gate_folders else data
    route, gates = _gates(options, load, data, compared, out)
    gc.collect()  # modules know one another, and would stay with their weights until Python looks for such
    give_freed_memory_back()
    route = route.model_copy(update={"relative_cost": _cost(options, load, route, out)})
    return write_result(route, data, compared, gates, 0.0, out, offload_entry(options))


def _gates(
    options: FitOptions, load: LoadVerifier, data: TraceDataModule, compared: TraceDataModule, out: Path
) -> tuple[Route, FittedGates]:
    """The route, which its options give, and gates by what it would have said on the texts."""
    verifier = load(options.model.verifier, layers=False)
    refuse_other_verifier(data.verifier_ref(), verifier.ref)
    inputs = FitInputs(RoutedModel(verifier.model), Route(), [], read_residuals)
    held = fit_parts(inputs, options.model.further_options)
    route = save_parts(Route(), held, options.model.part_options, out)
    routed = load_routed(verifier.model, route, out)
    check_memory(routed.memory, options.model.memory)
    stream_layers(routed, route, Offload("disk"), "eager")
    give_freed_memory_back()
    gates = fit_gates(
        routed, compared.training_texts(), compared.validation_texts(), options.model.max_run, HELD_WIDENED
    )
    return route.model_copy(update={"memory": routed.memory}), gates


def _cost(options: FitOptions, load: LoadVerifier, route: Route, out: Path) -> RelativeCost:
    """Time of a slim pass over that of a full one, as both will decode here, reading included."""
    verifier = load(options.model.verifier, dtype=fastest_dtype(torch.device("cpu")), layers=False)
    return cost_of(load_ready(verifier.model, route, out, Offload("disk")))
