"""``viasd cache``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from viasd_calib.cli import main
from viasd_calib.cli.caches import cache_folders
from viasd_calib.models.hashes import cache_folder
from viasd_calib.slim.offload.layer_files import files_folder
from viasd_calib.slim.offload.rounded_files import rounded_folder


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("home", ["HF_HOME", "XDG_CACHE_HOME"])
def test_folders_are_those_that_are_filled(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(home, str(tmp_path / "other"))
    assert cache_folders()["converted"] == cache_folder() / "gguf"
    assert cache_folders()["hashes"] == cache_folder() / "hashes"
    assert cache_folders()["layers"] in files_folder("0", "native").parents
    assert cache_folders()["low_bits"] in rounded_folder("0", torch.float32).parents


def test_caches_are_shown_and_one_is_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = cache_folders()
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(2_500_000))
    assert main(["cache"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    for name in folders:
        assert [name, "2.5"] in rows
    assert main(["cache", "--clear", "compiled"]) == 0
    assert capsys.readouterr().out == f"emptied compiled: 2.5 MB in {tmp_path / 'kernels'}\n"
    assert [name for name, folder in folders.items() if not folder.exists()] == ["compiled"]
    assert main(["cache", "--clear", "compiled"]) == 0
    assert main(["cache", "--clear", "all"]) == 2
    assert "--clear is 'all'; give one of converted, layers, low_bits, accelerate, hashes" in capsys.readouterr().err


def test_an_empty_variable_names_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/viasd_calib"
    found = cache_folders()
    assert found["hashes"] == cache_folder() / "hashes"
    assert all(folder.is_absolute() for folder in found.values())


def test_what_another_process_removes_while_it_is_counted_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the temporary files of one that is started meanwhile."""
    folder = cache_folders()["layers"]
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(2_500_000))
    (folder / "going").write_bytes(bytes(1_000_000))
    own = Path.rglob

    def removing(self: Path, pattern: str) -> Iterator[Path]:
        for path in own(self, pattern):
            if path.name == "going":
                path.unlink()
            yield path

    monkeypatch.setattr(Path, "rglob", removing)
    assert main(["cache"]) == 0
    assert ["layers", "2.5"] in [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
