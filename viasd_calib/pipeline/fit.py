"""A slim verifier trained on traces, in one round or several, and the first gates."""

from __future__ import annotations

from dataclasses import replace

from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.errors import CalibrationError
from viasd_calib.models import LoadVerifier, load_verifier
from viasd_calib.pipeline.fit_checks import check_devices, check_fit, last_checkpoint
from viasd_calib.pipeline.fit_gates import check_streamed, fit_gates_alone, gates_alone
from viasd_calib.pipeline.fit_memory import with_bits_for_memory
from viasd_calib.pipeline.fit_once import fit_once
from viasd_calib.pipeline.fit_options import FitOptions, lightning_refusals
from viasd_calib.pipeline.notices import notice
from viasd_calib.pipeline.rounds import fit_rounds
from viasd_calib.training.fit import NewTrainer


def fit(
    options: FitOptions, load: LoadVerifier | None = None, new_trainer: NewTrainer | None = None
) -> FitArtifact | None:
    """Find a route, train its slim verifier, fit the first gates on it, and write all three.

    Args:
        load: loads the verifier; None for :func:`viasd_calib.models.load_verifier`.
        new_trainer: makes the trainers; None for :meth:`FitOptions.new_trainer`.

    Returns:
        What was written; None in a process that only helps to train.

    Raises:
        ViasdError: options that cannot be, most of them before a model is loaded.
    """
    if not isinstance(options, FitOptions):
        raise CalibrationError(f"the options of a fit are {options!r}; give a FitOptions")
    entries = options.entries()
    check_fit(entries)
    if options.offload is not None:
        check_streamed(options)
    check_devices(entries.get("trainer.accelerator"), entries.get("trainer.precision"))
    if options.ckpt_path == "last":
        options = replace(options, ckpt_path=str(last_checkpoint(entries)))
        notice(f"goes on from {options.ckpt_path}")
    options = with_bits_for_memory(options, load or load_verifier)
    if gates_alone(options):
        return fit_gates_alone(options, load or load_verifier)
    job = fit_once if options.rounds == 1 else fit_rounds
    with lightning_refusals():
        return job(options, load or load_verifier, new_trainer or options.new_trainer)
