"""What cannot be read for each pass is refused before a model is loaded."""

from __future__ import annotations

import os
from typing import Any

import pytest

from viasd_calib.errors import ModelError
from viasd_calib.slim.offload.settings import Offload, check_offload, why_no_reading


@pytest.mark.parametrize(
    ("offload", "device", "backend", "message"),
    [
        (Offload(), "cpu", "compiled", "backend compiled cannot read layers"),
        (Offload(), "mps", None, "runs on a CPU and on CUDA, not on mps"),
        (Offload(), "cuda:0", None, "give --offload cpu"),
        (Offload("tape"), "cpu", None, "offload is 'tape'"),  # type: ignore[arg-type]
        (Offload(memory=0), "cpu", None, "memory is 0"),
    ],
)
def test_what_cannot_be_is_refused(offload: Offload, device: str, backend: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_offload(offload, device, backend)


def test_a_system_without_such_reads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_reading() is None
    check_offload(Offload(), "cpu", None)
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr("platform.system", lambda: "Windows")
    with pytest.raises(ModelError, match=r"does not run here: .* \(os.preadv\) on Windows; use Linux"):
        check_offload(Offload("cpu"), "cpu", None)
