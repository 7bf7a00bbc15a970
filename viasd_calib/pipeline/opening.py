"""From the options of a job to the engine of a routing spec."""

from __future__ import annotations

from viasd_calib.choices import Backend
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.options import SpecModels
from viasd_calib.spec import RoutingSpec


def open_engine(
    path: str,
    spec: RoutingSpec,
    options: SpecModels,
    load: lazy_types.LoadVerifier | None = None,
    backend: Backend | None = None,
) -> lazy_types.Engine:
    """The engine of a spec that has been read, on the models that the options name.

    Args:
        path: of the spec.
        load: loads the verifier; None for :func:`viasd_calib.models.load_verifier`.

    Raises:
        ModelError: a model is missing or damaged.
    """
    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.models import load_verifier

    return load_engine(
        path,
        spec=spec,
        verifier=options.verifier,
        draft_model=options.draft_model,
        dtype=options.dtype,
        device=options.device,
        backend=backend,
        load=load or load_verifier,
    )
