"""What tests of backend ``packed`` need of the machine."""

from __future__ import annotations

import pytest
import torch

from viasd_calib.slim.onednn_linear import why_not_packed


def skip_where_not_packed(backend: str, dtype: str) -> None:
    """Skip a test that runs on a backend, where that is ``packed`` and this CPU does not pack weights of ``dtype``."""
    lacking = why_not_packed(torch.device("cpu"), getattr(torch, dtype)) if backend == "packed" else None
    if lacking is not None:
        pytest.skip(f"backend packed does not run here: {lacking}")
