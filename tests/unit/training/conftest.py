from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TinyFolder, tiny_prompts
from viasd_calib.models import load_verifier
from viasd_calib.traces.capture import capture
from viasd_calib.traces.folder import CaptureSettings


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces of the tiny verifier."""
    folder = tmp_path_factory.mktemp("traces")
    settings = CaptureSettings(max_new_tokens=16, batch_size=8)
    capture(load_verifier(str(tiny_folder)), None, "none", tiny_prompts(24), folder, settings)
    return folder
