"""A command reads its spec, and hashes the tensors beside it, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import viasd_calib.spec as spec_module
from tests.tiny import TinyFolder, tiny_spec
from viasd_calib.cli import main

COMMANDS = {
    "generate": ["generate", "--prompt", "w1", "--max-new-tokens", "2"],
    "capture": ["capture", "--prompts", "p.jsonl", "--split", "null", "--max-new-tokens", "2", "--out", "out"],
    "bench": ["bench", "--prompts", "p.jsonl", "--max-new-tokens", "2", "--json", "bench.json"],
    "route-quality": ["route-quality", "--prompts", "p.jsonl", "--max-new-tokens", "2", "--json", "quality.json"],
    "profile": ["profile", "--widths", "[1]", "--contexts", "[8]", "--batches", "[1]", "--repeats", "2", "--json", "o"],
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the specs that are read from now on, each time anew."""
    found: list[Path] = []
    read: Any = spec_module._read

    def noted(path: Path) -> Any:
        found.append(path)
        return read(path)

    monkeypatch.setattr(spec_module, "_read", noted)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_its_spec_once(
    command: str, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    path = tiny_spec(tiny_folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(json.dumps({"turns": ["w1"]}))
    reads.clear()
    assert main([*COMMANDS[command], "--spec", str(path)]) == 0
    assert reads == [path]
