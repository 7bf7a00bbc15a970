"""Gates, and the audits that a certificate permits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.certificates import make_certificate
from tests.tiny import constant_gate, small_gates, small_spec, write_document
from viasd_calib.errors import SpecError
from viasd_calib.schema.gates import CONVENTIONS
from viasd_calib.spec import SLIM_FEATURES, Gates, LogisticGate, load_spec

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = NUMBERS.filter(lambda number: number > 0)


@given(
    values=st.lists(st.tuples(NUMBERS, POSITIVE, NUMBERS), min_size=1, max_size=len(SLIM_FEATURES)),
    bias=NUMBERS,
)
def test_the_numbers_of_a_gate_survive_to_the_last_bit(values: list[tuple[float, float, float]], bias: float) -> None:
    mean, scale, weight = (list(column) for column in zip(*values, strict=True))
    gate = LogisticGate(features=[*SLIM_FEATURES[: len(values)]], mean=mean, scale=scale, weight=weight, bias=bias)
    assert LogisticGate.model_validate_json(gate.model_dump_json()) == gate


@pytest.mark.parametrize(
    "entries",
    [
        {"accept_at": 0.5, "escalate_below": 0.5},
        {"accept_at": 0.3, "escalate_below": 0.5},
        {"accept_at": 0.8},
        {"accept_at": 0.8, "escalate_below": 0.5, "regenerate_at": 0.7},
    ],
)
def test_the_ratio_convention_needs_a_band_to_regenerate_in(entries: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Gates(convention="ratio", **entries)
    assert Gates(convention="ratio", accept_at=0.8, escalate_below=0.5).escalate_below == 0.5


@pytest.mark.parametrize(
    "changes",
    [{"slim": None}, {"regenerate_at": None}, {"escalate_below": 0.2}, {"accept_at": 0.0}],
)
def test_the_calibrated_convention_needs_its_gate_and_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        small_gates(**changes)


def test_a_new_convention_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONVENTIONS, "top_probability", ())

    class NewGates(Gates):
        convention: Literal[tuple(CONVENTIONS)]  # type: ignore[valid-type]  # as in the package

    assert NewGates(convention="top_probability", accept_at=0.9).slim_tier
    for threshold in ("regenerate_at", "escalate_below"):
        with pytest.raises(ValidationError, match="top_probability convention needs no regenerate_at and no escalate"):
            NewGates(convention="top_probability", accept_at=0.9, **{threshold: 0.5})


@pytest.mark.parametrize("changes", [{"draft_stop_below": 0.3}, {"draft_accept_at": 0.9}])
def test_bounds_on_the_draft_need_a_draft_gate(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need a draft gate"):
        small_gates(**changes)
    small_gates(draft=constant_gate("draft_margin", 0.0), **changes)


@pytest.mark.parametrize("changes", [{"weight": [1.0, 2.0]}, {"scale": [0.0]}, {"scale": [-1.0]}, {"features": []}])
def test_a_gate_of_uneven_parts_is_refused(changes: dict[str, Any]) -> None:
    entries = {"features": ["pending"], "mean": [0.0], "scale": [1.0], "weight": [1.0], "bias": 0.0}
    with pytest.raises(ValidationError):
        LogisticGate(**{**entries, **changes})


@pytest.mark.parametrize("audit", ["tolerant", "off"])
def test_a_lossy_audit_is_refused_where_nothing_is_certified(tmp_path: Path, audit: str) -> None:
    for nothing in (None, make_certificate(None)):
        document = small_spec(certificate=nothing).model_dump(mode="json")
        spec = load_spec(write_document(tmp_path / "strict.json", document))
        assert spec.decoding.audit == "strict"
        assert spec.certified_bound is None
        document["decoding"]["audit"] = audit
        with pytest.raises(SpecError, match=f"{audit}.*calibrate it, or set decoding.audit to strict"):
            load_spec(write_document(tmp_path / "lossy.json", document))
    document["certificate"] = make_certificate(0.02).model_dump(mode="json")
    spec = load_spec(write_document(tmp_path / "bound.json", document))
    assert spec.decoding.audit == audit
    assert spec.certified_bound == 0.02
