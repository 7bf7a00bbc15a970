"""What is shipped can be loaded: specs name the tensors that lie beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from viasd_calib.draft.build import name_draft
from viasd_calib.spec import ShallowDraft, file_sha256, load_spec

CHECKPOINTS = Path("checkpoints")
SPECS = sorted(CHECKPOINTS.glob("*/*.json"))


def test_something_is_shipped() -> None:
    assert SPECS


@pytest.mark.parametrize("path", SPECS, ids=str)
def test_shipped_specs_load(path: Path) -> None:
    """Hashes of drafter and adapter are checked on the way."""
    spec = load_spec(path)
    assert spec.verifier.name_or_path.startswith(path.parent.name), "the verifier itself, not where it once lay"
    assert spec.evidence is not None, "a shipped spec says how fast it was"


@pytest.mark.parametrize("folder", sorted(CHECKPOINTS.glob("*/draft")), ids=str)
def test_shipped_drafters_are_what_their_description_says(folder: Path) -> None:
    """The drafter by itself, as `viasd capture --draft` takes it."""
    described, _ = name_draft(str(folder))
    assert isinstance(described, ShallowDraft)
    assert described.tensors.sha256 == file_sha256(folder / described.tensors.path)
