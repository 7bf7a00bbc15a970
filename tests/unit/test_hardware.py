from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from viasd_calib import hardware as module
from viasd_calib.hardware import LARGE_CACHE, hardware, last_level_cache


def test_hardware_is_named() -> None:
    named = hardware(torch.device("cpu"))
    assert named["device"]
    assert named["threads"] == torch.get_num_threads()
    assert named["torch"] == torch.__version__
    assert json.loads(json.dumps(named)) == named


def test_the_last_cache_is_the_largest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(module, "CACHES", tmp_path)
    assert last_level_cache(cpu) == LARGE_CACHE
    for number, size in enumerate(("48K", "2048K", "33M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n", encoding="ascii")
    assert last_level_cache(cpu) == 33 * 2**20
