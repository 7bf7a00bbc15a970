"""The published JSON Schema is the one the code enforces."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from viasd_calib.cli import main
from viasd_calib.spec import json_schema


def test_the_published_schema_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    published = resources.files("viasd_calib").joinpath("schemas/routing_spec.schema.json").read_text("utf-8")
    assert json.loads(published) == json_schema(), "write it anew with viasd schema"
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_every_entry_is_described() -> None:
    schema = json_schema()
    parts = {"RoutingSpec": schema, **schema["$defs"]}
    described = [(name, entry, "description" in shape) for name, part in parts.items()
                 for entry, shape in part.get("properties", {}).items()]  # fmt: skip
    assert len(described) > 60
    assert [f"{name}.{entry}" for name, entry, has in described if not has] == []
