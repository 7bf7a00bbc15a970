from __future__ import annotations

from pathlib import Path

from tests.tiny import tiny_model, tiny_shallow, tiny_shape
from viasd_calib.cli.export import _copy_draft
from viasd_calib.draft.build import build_drafter, describe_shallow
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.shallow import ShallowDrafter, save_shallow
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import CombinedDraft


def test_tensors_of_a_combined_drafter_lie_beside_the_spec(tmp_path: Path) -> None:
    routed, source, folder = RoutedModel(tiny_model()), tmp_path / "source", tmp_path / "spec"
    source.mkdir()
    folder.mkdir()
    save_shallow(tiny_shallow(routed), source / "drafter.safetensors")
    describe_shallow(source, tiny_shape())
    draft = _copy_draft(f"prompt_lookup+int8:{source}", folder)
    assert isinstance(draft, CombinedDraft)
    assert draft.model.quantize == "int8"
    drafter = build_drafter(draft, folder, routed)
    assert isinstance(drafter, CombinedDrafter)
    assert isinstance(drafter.model, ShallowDrafter)
    assert (folder / "draft" / "drafter.safetensors").read_bytes() == (source / "drafter.safetensors").read_bytes()
