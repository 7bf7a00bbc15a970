"""Drafters' names in files that are moved together with what they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from viasd_calib.draft.places import draft_at, draft_from, same_draft


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here" / "models" / "drafter").mkdir(parents=True)
    (tmp_path / "here" / "runs" / "traces").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "int8:", "int4:", "prompt_lookup+", "prompt_lookup+int8:"])
def test_a_folder_is_found_from_anywhere(place: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = draft_from(f"{prefix}models/drafter", Path("runs/traces"))
    assert written == f"{prefix}../../models/drafter"
    (place / "here").rename(place / "there")
    monkeypatch.chdir(place)
    found = draft_at(written, Path("there/runs/traces"))
    assert found.startswith(prefix)
    assert Path(found.removeprefix(prefix)).samefile(place / "there" / "models" / "drafter")


@pytest.mark.parametrize("name", ["none", "prompt_lookup", "gpt2", "int8:org/model", "prompt_lookup+smollm2-135m"])
def test_what_is_no_folder_stays(place: Path, name: str) -> None:
    assert draft_from(name, Path("runs/traces")) == name
    assert draft_at(name, Path("runs/traces")) == name


def test_an_absolute_path_stays(place: Path) -> None:
    name = f"int8:{place / 'here' / 'models' / 'drafter'}"
    assert draft_from(name, Path("runs/traces")) == name
    assert draft_at(name, Path("runs/traces")) == name


def test_names_of_earlier_releases_are_the_same_drafter(place: Path) -> None:
    """They were written as they lay from where the command was run."""
    folder = Path("runs/traces")
    assert draft_at("models/drafter", folder) == "models/drafter"
    assert same_draft("models/drafter", "../../models/drafter", folder)
    assert not same_draft("int8:models/drafter", "../../models/drafter", folder)
    assert not same_draft("prompt_lookup", "../../models/drafter", folder)
