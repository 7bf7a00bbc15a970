"""From what ``viasd fit`` wrote to a decoder, before there is a routing spec."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine, assemble
from viasd_calib.decoding.policies import Policy
from viasd_calib.decoding.strategies.three_tier import NEVER, ThreeTier
from viasd_calib.draft.build import name_draft, policy_drafter, with_weights
from viasd_calib.draft.places import draft_at, relocated
from viasd_calib.errors import WeightsWarning
from viasd_calib.models import Verifier
from viasd_calib.pipeline.notices import notice
from viasd_calib.slim.backends import choose_backend, fastest_dtype, low_bits_have_kernels
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.spec import Decoding, DType, Gates, Route, RoutingSpec, VerifierRef


def open_fit(
    fitted: FitArtifact,
    folder: Path,
    loaded: Verifier,
    draft_model: str | None = None,
    offload: Offload | None = None,
) -> Engine:
    """What the fit in ``folder`` names, with gates that trust nothing.

    A fit may be calibrated on a verifier with other weights of the same shape; the engine's spec then names those.

    Args:
        draft_model: where to find the draft model, in place of its name in the fit.
        offload: how layers are read of a verifier that was loaded without them.

    Raises:
        SpecError: the verifier is of another shape.
        ModelError: the draft model is not there, or ``draft_model`` is given and the fit names none.
    """
    draft, draft_folder = name_draft(draft_at(fitted.draft, folder))
    if draft_model is not None:
        draft = relocated(draft, draft_model)
    gates = Gates(draft=fitted.draft_gate, slim=fitted.slim_gate, accept_at=NEVER, regenerate_at=NEVER)
    own = verifier_of(fitted.verifier, loaded.ref)
    spec = RoutingSpec(verifier=own, draft=draft, route=fitted.route, gates=gates)
    backend = choose_backend(loaded.model)  # what will decode is what is timed
    return assemble(spec, folder, loaded, draft_folder=draft_folder, backend=backend, offload=offload)


def dtype_of_fit(route: Route, device: str, bounded: bool = False) -> DType:
    """The number format to calibrate a fit in, where the user names none, with a notice where it is not float32.

    A fit for little memory counted bytes in the fastest format of the machine: its layers are read in that. Low bits
    gain nothing without kernels: a route that has some is calibrated in the format in which the fit found its
    passes cheaper than full ones, where that format has kernels on this machine.

    Args:
        bounded: whether the fit was told how much memory there is, and layers are read.
    """
    fastest = fastest_dtype(torch.device(device))
    if bounded and fastest != "float32":
        notice(
            f"calibrates in {fastest}, in which the fit counted what is in memory, and which the spec will decode in; "
            "give --dtype float32 for the format of the fit, in which layers take twice as much"
        )
        return fastest
    cost = route.relative_cost
    if route.low_bit is None or cost is None or cost.dtype == "float32" or min(cost.measured.values()) >= 1:
        return "float32"
    if not low_bits_have_kernels(torch.device(device), getattr(torch, cost.dtype)):
        return "float32"
    notice(
        f"calibrates in {cost.dtype}, in which low bits have kernels here, and which the spec will decode in; give "
        "--dtype float32 for the format of the fit, in which a slim pass gains nothing"
    )
    return cost.dtype


def verifier_of(fitted: VerifierRef, loaded: VerifierRef) -> VerifierRef:
    """What a spec says of its verifier, where a fit is used with the one that is loaded.

    Warns where the fit learned from other weights.
    """
    if fitted.says_the_same(loaded):
        return fitted.model_copy(update={"weights_sha256": loaded.weights or fitted.weights})
    if fitted.config_sha256 == loaded.config_sha256:
        warnings.warn(
            f"the fit learned from other weights than those of {loaded.name_or_path}, which may agree less; "
            "capture and fit with these for routes and gates of their own",
            WeightsWarning,
            stacklevel=2,
        )
        return loaded
    return fitted  # is refused where the two are put together


def policy_of(engine: Engine, gates: Gates, decoding: Decoding, dtype: DType) -> RoutingSpec:
    """What an engine decodes by at other gates and settings, in ``dtype``: as a spec exported of them says it."""
    spec = engine.spec
    return spec.model_copy(
        update={
            "verifier": spec.verifier.model_copy(update={"dtype": dtype}),
            "draft": with_weights(spec.draft, Path()),  # a place that names a model leads there from here
            "gates": gates,
            "decoding": decoding,
        }
    )


def decoder_at(engine: Engine, gates: Gates, decoding: Decoding) -> Decoder:
    """The three-tier decoder of an engine at other gates and settings, which nothing needs to certify."""
    method = ThreeTier.from_spec(gates, decoding, engine.routed.device)
    drafter = policy_drafter(engine.spec.draft, decoding, engine.drafter)
    return Decoder(engine.routed, drafter, method, engine.verifier.eos_ids)


def with_policy(engine: Engine, policy: Policy) -> Engine:
    """The engine of a policy of exact decoding: its spec says that, and nothing of what is certified or planned."""
    gates, decoding = policy.planned().applied_to(engine.spec.gates, Decoding(audit="strict"))
    changes = {"gates": gates, "decoding": decoding, "certificate": None, "plan": None, "evidence": None}
    return replace(engine, spec=engine.spec.model_copy(update=changes))


def policy_decoder(engine: Engine, policy: Policy) -> Decoder:
    """A decoder of exact decoding by a policy."""
    spec = with_policy(engine, policy).spec
    return decoder_at(engine, spec.gates, spec.decoding)
