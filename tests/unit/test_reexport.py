"""The shipped specs, exported again, are what they were."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from viasd_calib.pipeline.export import copy_draft
from viasd_calib.slim.checking import tensor_misfits
from viasd_calib.slim.parts.base import copy_parts
from viasd_calib.spec import load_spec, save_spec

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
CONTENT = {
    "smollm2-135m/routing.json": "ce3617c9f78856fdc5568f0db12124c3911726a3475dab095cf1ed3e7bfaf305",
    "smollm2-135m/offload.json": "b1a0d0b208cecb33d8edf723bbb6b91df2f530e5878ca0d22cf2190ad985c78e",
    "qwen2.5-coder-1.5b/routing.json": "83974d5d18c40634c74652aa4edd02a1936c4493c2ea331c6e703cbfbe49aec7",
    "qwen2.5-coder-1.5b/offload.json": "e9c65bc5b4d1f7d3441b9c0d38b84623c521c7ce12d7cebe43320a8601b01697",
}


def content_sha256(spec: Path) -> str:
    """Hash of what a spec has: not of its producer and version, nor of entries that are null."""
    document = json.loads(spec.read_text(encoding="utf-8"))
    kept = {name: entry for name, entry in document.items() if name not in ("producer", "schema_version")}
    return hashlib.sha256(json.dumps(_without_nulls(kept), sort_keys=True).encode()).hexdigest()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return value


@pytest.mark.parametrize(("name", "sha256"), CONTENT.items())
def test_a_shipped_spec_exported_again_has_the_same_content(name: str, sha256: str, tmp_path: Path) -> None:
    path, out = CHECKPOINTS / name, tmp_path / "routing.json"
    spec, source = load_spec(path), path.parent
    moved = {
        "draft": copy_draft(spec.draft, source, tmp_path),
        "route": copy_parts(spec.route, source, tmp_path),
    }
    save_spec(spec.model_copy(update=moved), out)
    again = load_spec(out)  # the tensors lie beside it, with the bytes that it names
    assert tensor_misfits(again, tmp_path) == []
    assert content_sha256(out) == content_sha256(path) == sha256
