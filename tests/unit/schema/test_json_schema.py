"""The published JSON Schema is the one the code enforces."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from tests.tiny import full_spec, small_document
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


def test_the_schema_accepts_what_the_package_writes(tmp_path: Path) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(small_document(), schema)
    jsonschema.validate(full_spec(tmp_path).model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**small_document(), "surprise": 1}, schema)


def test_the_schema_names_what_is_required() -> None:
    schema = json_schema()
    assert set(schema["required"]) == {"verifier", "draft", "route", "gates"}
    assert schema["additionalProperties"] is False
    assert schema["$schema"].endswith("2020-12/schema")
