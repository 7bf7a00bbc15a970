"""A drafter's tensors are held against what the spec says of them, before any model is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import constant_gate, tiny_model, tiny_shallow, verifier_ref
from viasd_calib.draft.checking import drafter_misfits
from viasd_calib.draft.shallow import load_shallow, save_shallow
from viasd_calib.errors import ModelError
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Gates, Route, RoutingSpec, ShallowDraft, ShallowShape, tensor_file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"num_layers": 1}, "holds layers 0, 1, the spec names num_layers 1"),
        ({"num_layers": 3}, "holds layers 0, 1, the spec names num_layers 3"),
        ({"head_vocab": 11}, "head.weight is of shape .*, the spec names head_vocab 11"),
        ({"taps": (1,)}, "from_taps.weight is of shape .*, the spec names 1 taps"),
    ],
)
def test_a_drafter_of_another_shape_is_found(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    verifier = RoutedModel(tiny_model())
    model = tiny_shallow(verifier)
    path = tmp_path / "drafter.safetensors"
    save_shallow(model, path)
    shape = {**model.shape.model_dump(), **changes}
    spec = RoutingSpec(
        verifier=verifier_ref(),
        draft=ShallowDraft(**shape, tensors=tensor_file(path, tmp_path)),
        route=Route(attention_skip=[1]),
        gates=Gates(slim=constant_gate("pending", 0.0), accept_at=0.9, regenerate_at=0.8),
    )
    found = drafter_misfits(spec, tmp_path)
    if message is None:
        assert found == []
        return
    assert len(found) == 1
    assert re.search(f"{message}; export the spec again, or train the drafter", found[0])
    with pytest.raises(ModelError, match="export the spec again, or train the drafter for this verifier"):
        load_shallow(verifier, ShallowShape(**shape), path)
