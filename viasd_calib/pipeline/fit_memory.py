"""Choosing the bits of a slim verifier by the memory that it will have where it decodes."""

from __future__ import annotations

from dataclasses import replace

import torch

from viasd_calib.errors import CalibrationError
from viasd_calib.models import LoadVerifier
from viasd_calib.option_types import bytes_of
from viasd_calib.pipeline.fit_options import FitOptions
from viasd_calib.pipeline.notices import notice
from viasd_calib.slim.backends import choose_backend, fastest_dtype
from viasd_calib.slim.offload.bits_for_memory import bits_for_memory
from viasd_calib.spec import OffloadRef
from viasd_calib.training.options import SlimVerifierOptions


def with_bits_for_memory(options: FitOptions, load: LoadVerifier) -> FitOptions:
    """The same options with as many bits as ``memory`` allows, with a notice; as they are where it bounds nothing.

    The verifier is opened without its layers for that, in the number format that it decodes in here, and counted as the
    backend holds it that then runs it.

    Raises:
        CalibrationError: the options describe another slim verifier than one whose low bits alone make it cheap.
        ModelError: not even the fewest bits fit.
    """
    if options.memory is None:
        return options
    model = options.model
    if not _of_low_bits_alone(model):
        raise CalibrationError(
            "--memory chooses the bits of a slim verifier of all layers with nothing trained, as that of "
            "--config fit/low-bit; leave it out here, or leave out options of the model"
        )
    memory = bytes_of("--memory", options.memory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    empty = load(model.verifier, dtype=fastest_dtype(device), layers=False)
    choice, residency = bits_for_memory(empty.model, memory, choose_backend(empty.model))
    notice(
        f"--memory {memory:,} bytes: attention in {choice.attention} bits, MLPs in {choice.mlp}, the head in "
        f"{choice.head}; {residency.resident_bytes:,} bytes stay in memory, {residency.cold_bytes:,} are read for each "
        "full pass"
    )
    return replace(options, model=replace(model, parts={"low_bit": choice.options}))


def _of_low_bits_alone(model: SlimVerifierOptions) -> bool:
    """Whether a slim verifier is q in 8 bits and nothing else, which is what bytes are counted for."""
    others = model.route_choice != "whole" or model.rank != 0 or model.mlp_keep < 1 or model.head_vocab
    return not others and model.parts == {"low_bit": {"bits": 8}}


def offload_entry(options: FitOptions) -> OffloadRef | None:
    """How it is to decode; None where all of the verifier will be in memory."""
    if options.memory is None and options.offload is None:
        return None
    kind = "cpu" if torch.cuda.is_available() else "disk"
    return OffloadRef(kind=kind, memory=None if options.memory is None else bytes_of("--memory", options.memory))
