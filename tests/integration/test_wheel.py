"""The package as a wheel brings it: what lies in it, and what it answers far from a clone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALL = "import sys; from viasd_calib.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel of this clone was unpacked into."""
    built, folder = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("installed")
    source = built / "source"
    source.mkdir()  # links: building leaves files beside the sources
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "viasd_calib", "configs", "checkpoints"):
        (source / name).symlink_to(ROOT / name)
    words = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(built)]
    subprocess.run(words, cwd=source, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def answer(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What ``viasd`` of the wheel says, run in ``folder``, with the libraries of this environment alone."""
    libraries = sysconfig.get_path("purelib")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), libraries])}
    call = f"import viasd_calib; assert viasd_calib.__file__.startswith({str(installed)!r}); {CALL}"
    return subprocess.run(
        [sys.executable, "-S", "-c", call, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_wheel_brings_what_the_readme_names(installed: Path, tmp_path: Path) -> None:
    package = installed / "viasd_calib"
    for name in ("configs/quickstart.yaml", "configs/fit/quick.yaml", "checkpoints/smollm2-135m/draft/draft.json",
                 "checkpoints/smollm2-135m/routing.json", "schemas/routing_spec.schema.json", "data/prompts.jsonl",
                 "py.typed"):  # fmt: skip
        assert (package / name).is_file(), name
    assert not (package / "checkpoints/qwen2.5-coder-1.5b").exists()
    shown = answer(installed, tmp_path, "run", "--config", "quickstart", "--print-config")
    assert shown.returncode == 0, shown.stderr
    assert "draft: checkpoints/smollm2-135m/draft" in shown.stdout
    assert '"$id"' in answer(installed, tmp_path, "schema").stdout
    missing = answer(installed, tmp_path, "validate", "checkpoints/qwen2.5-coder-1.5b/routing.json")
    assert missing.returncode == 1
    assert "it is not among what the package brings (checkpoints/smollm2-135m/routing.json)" in missing.stderr
