"""From what ``viasd fit`` left behind to a decoder, before there is a routing spec."""

from __future__ import annotations

from pathlib import Path

from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.decoding.decoder import Decoder, Engine, assemble, three_tier
from viasd_calib.decoding.rounds import NEVER
from viasd_calib.draft.build import name_draft
from viasd_calib.models import Verifier
from viasd_calib.slim.backends import default_backend
from viasd_calib.spec import Decoding, Gates, RoutingSpec


def open_fit(fitted: FitArtifact, folder: Path, loaded: Verifier) -> Engine:
    """What the fit in ``folder`` names, with gates that trust nothing."""
    draft, draft_folder = name_draft(fitted.draft)
    gates = Gates(draft=fitted.draft_gate, slim=fitted.slim_gate, accept_at=NEVER, regenerate_at=NEVER)
    spec = RoutingSpec(verifier=fitted.verifier, draft=draft, route=fitted.route, gates=gates)
    backend = default_backend(loaded.model.device, loaded.model.dtype)  # what will decode is what is timed
    return assemble(spec, folder, loaded, draft_folder=draft_folder, backend=backend)


def decoder_at(engine: Engine, gates: Gates, decoding: Decoding) -> Decoder:
    """The three-tier decoder of an engine at other gates and settings, which nothing needs to certify."""
    method = three_tier(gates, decoding, engine.routed.device)
    return Decoder(engine.routed, engine.drafter, method, engine.verifier.eos_ids)
