"""What the parts of a route have in common: order, lines, drawings, and refusals."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
from matplotlib.patches import Rectangle
from pydantic import ValidationError

from tests.tiny import tiny_model
from viasd_calib.errors import ModelError, SpecError
from viasd_calib.evaluation import plots
from viasd_calib.schema import route as route_schema
from viasd_calib.schema.route import _OTHER_ENTRIES, PARTS_GROUP
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts import base
from viasd_calib.slim.parts.base import Mark, part_named, parts_of, route_words
from viasd_calib.spec import AdapterRef, BridgesRef, HeadVocab, MlpWidths, Route, TensorFile

TENSORS = TensorFile(path="some/tensors.safetensors", sha256="0" * 64)
FULL = Route(
    attention_skip=[1, 2],
    mlp_skip=[1],
    mlp_keep=MlpWidths(keep={2: 5, 3: 5}, tensors=TENSORS),
    bridges=BridgesRef(carry=True, tensors=TENSORS),
    head_vocab=HeadVocab(size=4096, tensors=TENSORS),
    adapter=AdapterRef(rank=8, alpha=16, targets=["q_proj"], tensors=TENSORS),
)


def test_parts_come_in_the_order_in_which_they_are_installed() -> None:
    names = ["skips", "mlp_keep", "bridges", "head_vocab", "adapter"]
    assert [part.name for part in parts_of(FULL)] == names
    assert [file.path for file in FULL.files] == [TENSORS.path] * 4


def test_each_part_has_its_words() -> None:
    assert route_words(FULL, 5) == (
        "3 of 5 attention and 4 of 5 MLP sublayers kept, 2 of them narrow (5 neurons), "
        "a bridge with token shift for the run skipped, "
        "4,096 output tokens, with a LoRA adapter of rank 8"
    )


def test_each_part_is_drawn() -> None:
    drawn = {part.name: part.drawing(FULL, 5) for part in parts_of(FULL)}
    assert [(mark.row, mark.first, mark.share) for mark in drawn["skips"]] == [
        ("attention", 1, 0),
        ("attention", 2, 0),
        ("mlp", 1, 0),
    ]
    assert drawn["bridges"] == [Mark("above", 1, 2, "bridge, for the run below it")]
    assert drawn["head_vocab"] == drawn["adapter"] == []
    cells = [patch for patch in plots.route_map(FULL, 5).axes[0].patches if isinstance(patch, Rectangle)]
    narrow = [cell.get_x() for cell in cells if cell.get_height() == pytest.approx(0.44)]
    assert narrow == [pytest.approx(1.58), pytest.approx(2.58)]


@pytest.mark.parametrize("name", ["nowhere", "not.a.name", "base"])
def test_a_part_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="is no part of a route that this release knows"):
        part_named(name)


def test_a_part_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="mean_update", value="tests.toy_part", group=PARTS_GROUP)
    monkeypatch.setattr(route_schema, "entry_points", lambda group, name: [point][: name == point.name])
    for known, name in ((sys.modules, "tests.toy_part"), (base._PARTS, point.name), (_OTHER_ENTRIES, point.name)):
        monkeypatch.delitem(known, name, raising=False)
    entry = {"scale": 0.5, "tensors": TENSORS.model_dump()}
    route = Route.model_validate({"mlp_skip": [1], "mean_update": entry})
    assert [part.title for part in parts_of(route)] == ["skipped sublayers", "mean updates"]
    assert route.files == [TENSORS]
    assert Route.model_validate_json(route.model_dump_json()) == route


@pytest.mark.parametrize("name", ["nowhere", "base"])
def test_an_entry_of_no_part_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} is a part of a package that is not installed"):
        Route.model_validate({name: {"tensors": TENSORS.model_dump()}})


@pytest.mark.parametrize(
    ("name", "words"),
    [("bridges", "bridges, but not their maps"), ("adapter", "an adapter, but not its tensors")],
)
def test_a_part_with_nothing_to_install_is_refused(name: str, words: str) -> None:
    route = Route(mlp_skip=[1]).model_copy(update={name: getattr(FULL, name)})
    with pytest.raises(ModelError, match=f"the route names {words}; open it with load_routed"):
        RoutedModel(tiny_model(), route)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "the part Another has no name"),
        ("skips", "routes have 'skips' already; give the part Another another name"),
        ("relative_cost", "routes have 'relative_cost' already"),
        ("head_vocab", "routes have 'head_vocab' already"),
    ],
)
def test_a_part_needs_a_name_of_its_own(name: str | None, message: str) -> None:
    kind = type("Another", (base.RoutePart,), {} if name is None else {"name": name})
    with pytest.raises(ValueError, match=message):
        base.register(kind)
