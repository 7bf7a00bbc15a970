"""Route training and calibration for three-tier speculative decoding (VIA-SD).

What most programs need is exported here and loaded when it is first asked for, so that ``import viasd_calib`` stays
light. ``viasd_calib.custom_generate`` makes a ``custom_generate`` for transformers.

>>> import viasd_calib
>>> viasd_calib.__version__
'0.1.0'
>>> viasd_calib.Sampling(temperature=0.8).top_p
1.0
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viasd_calib.decoding.decoder import Decoder
    from viasd_calib.decoding.engine import Engine, load_engine
    from viasd_calib.decoding.sampling import Sampling
    from viasd_calib.decoding.session import Generation
    from viasd_calib.decoding.transformers_adapter import custom_generate, generate
    from viasd_calib.errors import ViasdError
    from viasd_calib.models import Verifier, load_verifier
    from viasd_calib.pipeline.bench import bench
    from viasd_calib.pipeline.calibrate import calibrate
    from viasd_calib.pipeline.capture import capture
    from viasd_calib.pipeline.export import export
    from viasd_calib.pipeline.fit import fit
    from viasd_calib.pipeline.fit_options import FitOptions
    from viasd_calib.pipeline.options import (
        BenchOptions,
        CalibrateOptions,
        CaptureOptions,
        ExportOptions,
        ReportOptions,
    )
    from viasd_calib.pipeline.report import report
    from viasd_calib.pipeline.validate import validate
    from viasd_calib.prompts import Prompt, read_prompts
    from viasd_calib.spec import RoutingSpec, load_spec, save_spec
    from viasd_calib.traces.data import TraceDataModule
    from viasd_calib.training.options import SlimVerifierOptions

__version__ = "0.1.0"

__all__ = [
    "BenchOptions",
    "CalibrateOptions",
    "CaptureOptions",
    "Decoder",
    "Engine",
    "ExportOptions",
    "FitOptions",
    "Generation",
    "Prompt",
    "ReportOptions",
    "RoutingSpec",
    "Sampling",
    "SlimVerifierOptions",
    "TraceDataModule",
    "Verifier",
    "ViasdError",
    "__version__",
    "bench",
    "calibrate",
    "capture",
    "custom_generate",
    "export",
    "fit",
    "generate",
    "load_engine",
    "load_spec",
    "load_verifier",
    "read_prompts",
    "report",
    "save_spec",
    "validate",
]

_HOMES = {
    "BenchOptions": "pipeline.options",
    "CalibrateOptions": "pipeline.options",
    "CaptureOptions": "pipeline.options",
    "Decoder": "decoding.decoder",
    "Engine": "decoding.engine",
    "ExportOptions": "pipeline.options",
    "FitOptions": "pipeline.fit_options",
    "Generation": "decoding.session",
    "Prompt": "prompts",
    "ReportOptions": "pipeline.options",
    "RoutingSpec": "spec",
    "Sampling": "decoding.sampling",
    "SlimVerifierOptions": "training.options",
    "TraceDataModule": "traces.data",
    "Verifier": "models",
    "ViasdError": "errors",
    "bench": "pipeline.bench",
    "calibrate": "pipeline.calibrate",
    "capture": "pipeline.capture",
    "custom_generate": "decoding.transformers_adapter",
    "export": "pipeline.export",
    "fit": "pipeline.fit",
    "generate": "decoding.transformers_adapter",
    "load_engine": "decoding.engine",
    "load_spec": "spec",
    "load_verifier": "models",
    "read_prompts": "prompts",
    "report": "pipeline.report",
    "save_spec": "spec",
    "validate": "pipeline.validate",
}
"""The module of each exported name."""


def __getattr__(name: str) -> Any:
    """Load an exported name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look finds it at once
    return value


def __dir__() -> list[str]:
    """What is exported, also before it is loaded."""
    return sorted({*globals(), *__all__})
