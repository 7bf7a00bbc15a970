"""From the options of a job to the engine of a routing spec."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from viasd_calib.choices import Backend, StrategyName
from viasd_calib.errors import UsageError
from viasd_calib.option_types import bytes_of
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.shared_options import OffloadOptions, SpecModels
from viasd_calib.spec import OffloadRef, RoutingSpec

if TYPE_CHECKING:
    from viasd_calib.slim.offload.settings import Offload


def offload_of(options: OffloadOptions, own: OffloadRef | None = None) -> Offload | None:
    """Where the verifier's layers stay, by the options of a job and what a spec or a fit says.

    Raises:
        UsageError: a bound on memory or reading, and nothing to offload.
    """
    from viasd_calib.slim.offload.settings import Offload

    kind = options.offload or (None if own is None else own.kind)
    if kind is None or kind == "none":
        given = [name for name in ("memory", "bandwidth") if getattr(options, name) is not None]
        if given:
            raise UsageError(f"--{given[0]} bounds what --offload reads; give --offload disk (or cpu, on CUDA) too")
        return None
    memory = None if own is None else own.memory
    if options.memory is not None:
        memory = bytes_of("--memory", options.memory)
    return Offload(kind, memory, None if options.bandwidth is None else bytes_of("--bandwidth", options.bandwidth))


def open_engine(
    path: str,
    spec: RoutingSpec,
    options: SpecModels,
    load: lazy_types.LoadVerifier | None = None,
    backend: Backend | None = None,
    methods: Collection[StrategyName] | None = None,
) -> lazy_types.Engine:
    """The engine of a spec that has been read, on the models that the options name.

    Args:
        path: of the spec.
        load: loads the verifier; None for :func:`viasd_calib.models.load_verifier`.
        methods: that will be asked for; None for any.

    Raises:
        ModelError: a model is missing or damaged.
    """
    from viasd_calib.decoding.engine import load_engine
    from viasd_calib.models import load_verifier

    return load_engine(
        path,
        offload=(offload_of(options, spec.offload) or "none") if isinstance(options, OffloadOptions) else None,
        spec=spec,
        verifier=options.verifier,
        draft_model=options.draft_model,
        dtype=options.dtype,
        device=options.device,
        backend=backend,
        load=load or load_verifier,
        methods=methods,
    )
