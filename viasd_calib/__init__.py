"""Router training and calibration for three-tier speculative decoding (VIA-SD).

``viasd_calib.generate`` is a ``custom_generate`` for transformers; it is loaded when it is first asked for.

>>> import viasd_calib
>>> viasd_calib.__version__
'0.1.0'
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load what is exported but heavy, so that importing the package stays light."""
    if name == "generate":
        return import_module("viasd_calib.decoding.transformers_adapter").generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
