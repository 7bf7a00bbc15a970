"""Routes that a verifier can run, and those that it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.tiny import LAYERS, small_document, small_spec, write_document
from viasd_calib.errors import SpecError
from viasd_calib.spec import MlpWidths, Route, TensorFile, load_spec

HASH = "0123456789abcdef" * 4
WIDTHS_FILE = TensorFile(path="widths.safetensors", sha256=HASH)


@pytest.mark.parametrize("name", ["attention_skip", "mlp_skip"])
def test_a_layer_beyond_the_verifier_is_refused(tmp_path: Path, name: str) -> None:
    document = small_document()
    document["route"][name] = [0, LAYERS]
    with pytest.raises(SpecError, match=rf"route\.{name} names layer {LAYERS}.* 0 to {LAYERS - 1}"):
        load_spec(write_document(tmp_path / "routing.json", document))
    document["route"][name] = [0, LAYERS - 1]
    assert getattr(load_spec(write_document(tmp_path / "routing.json", document)).route, name) == [
        0,
        LAYERS - 1,
    ]


def test_an_mlp_is_narrowed_or_skipped(tmp_path: Path) -> None:
    widths = MlpWidths(keep={2: 9, 0: 20}, tensors=WIDTHS_FILE)
    assert Route(mlp_skip=[1], mlp_keep=widths).narrowed == {0, 2}
    with pytest.raises(ValidationError, match=r"mlp_keep and mlp_skip both name layer 2; .* take it out of one"):
        Route(mlp_skip=[1, 2], mlp_keep=widths)


def test_a_narrowed_layer_beyond_the_verifier_is_refused() -> None:
    with pytest.raises(ValidationError, match=rf"route\.mlp_keep names layer {LAYERS}.* 0 to {LAYERS - 1}"):
        small_spec(route=Route(mlp_keep=MlpWidths(keep={0: 1, LAYERS: 1}, tensors=WIDTHS_FILE)))


@pytest.mark.parametrize("keep", [{}, {0: 0}, {-1: 4}])
def test_widths_that_cannot_be_are_refused(keep: dict[int, int]) -> None:
    with pytest.raises(ValidationError, match="keep"):
        MlpWidths(keep=keep, tensors=WIDTHS_FILE)


@pytest.mark.parametrize("layers", [[1, 1], [2, 1], [-1]])
def test_layers_that_are_no_rising_indices_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValidationError, match="rising order"):
        Route(attention_skip=layers)


def test_a_part_of_a_package_that_is_not_installed_is_not_to_be_removed() -> None:
    with pytest.raises(ValidationError, match="constants is a part of a package that is not installed; install that"):
        Route.model_validate({"mlp_skip": [1], "constants": {"tensors": {}}})
    with pytest.raises(ValidationError, match="Extra inputs"):
        Route.model_validate({"mlp_skipp": [1]})
