from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TinyFolder, drafted_spec, tiny_model, tiny_shallow, tiny_shape, tiny_spec
from viasd_calib.choices import OffloadKind
from viasd_calib.cli import main
from viasd_calib.decoding.policies import Policy
from viasd_calib.draft.build import build_drafter, describe_shallow
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.shallow import ShallowDrafter, save_shallow
from viasd_calib.pipeline.export import _draft_of, copy_draft
from viasd_calib.pipeline.validate import verifier_misfits
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import CombinedDraft, OffloadRef, PlanEntry, load_spec, save_spec


def test_tensors_of_a_combined_drafter_lie_beside_the_spec(tmp_path: Path) -> None:
    routed, source, folder = RoutedModel(tiny_model()), tmp_path / "source", tmp_path / "spec"
    source.mkdir()
    folder.mkdir()
    save_shallow(tiny_shallow(routed), source / "drafter.safetensors")
    describe_shallow(source, tiny_shape())
    draft = copy_draft(*_draft_of(f"prompt_lookup+int8:{source}", folder), folder)
    assert isinstance(draft, CombinedDraft)
    assert draft.model.quantize == "int8"
    drafter = build_drafter(draft, folder, routed)
    assert isinstance(drafter, CombinedDrafter)
    assert isinstance(drafter.model, ShallowDrafter)
    assert (folder / "draft" / "drafter.safetensors").read_bytes() == (source / "drafter.safetensors").read_bytes()


def test_validate_fails_on_other_weights(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    spec = load_spec(tiny_spec(tiny_folder, tmp_path))
    own, other = (spec.verifier.model_copy(update={"weights_sha256": digit * 64}) for digit in "12")
    made = spec.model_copy(update={"verifier": own})
    assert verifier_misfits(made, own) == []
    (problem,) = verifier_misfits(made, other)
    assert "are not those the spec was made for: it decodes exactly with them, and certifies nothing" in problem
    (problem,) = verifier_misfits(made, other.model_copy(update={"num_layers": 9}))
    assert "num_layers" in problem


@pytest.mark.parametrize(("kind", "place"), [("disk", "disk"), ("cpu", "the host's memory")])
def test_validate_says_where_layers_are_read_from(
    kind: OffloadKind, place: str, tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_spec(tiny_folder, tmp_path)
    save_spec(load_spec(path).model_copy(update={"offload": OffloadRef(kind=kind)}), path)
    assert main(["validate", str(path)]) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith(f"layers are read from {place}")


@pytest.mark.parametrize(("bounds", "words"), [([None], "a plan of 1 row by"), ([64, None], "a plan of 2 rows by")])
def test_validate_says_how_many_rows_a_plan_has(
    bounds: list[int | None], words: str, tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = drafted_spec(tiny_folder, tmp_path)
    rows = [PlanEntry(max_context=bound, policy=Policy(draft_length=2).planned()) for bound in bounds]
    save_spec(load_spec(path).model_copy(update={"plan": rows}), path)
    assert main(["validate", str(path)]) == 0
    assert words in " ".join(capsys.readouterr().out.split())
