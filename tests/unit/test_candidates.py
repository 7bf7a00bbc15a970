"""Every certified candidate that a spec lists is one that was certified, whatever the spec itself decodes by."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.certificates import bind_candidates, make_certificate
from tests.tiny import TinyFolder, drafted_spec
from viasd_calib.binding import with_candidate
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.digest import policy_digest
from viasd_calib.draft.build import with_weights
from viasd_calib.errors import CertificateWarning, SpecError
from viasd_calib.spec import (
    SCHEMA_VERSION,
    CertifiedCandidate,
    PlanEntry,
    PlannedPolicy,
    RoutingSpec,
    file_sha256,
    load_spec,
    save_spec,
)

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(params=[None, 1], ids=["strict", "certified"])
def path(request: pytest.FixtureRequest, tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    """A spec with three candidates, which decodes exactly, or by the second of them."""
    made = drafted_spec(tiny_folder, tmp_path)
    bind_candidates(known_draft(made), made, active=request.param)
    return made


def known_draft(path: Path) -> RoutingSpec:
    """The spec at ``path``, with the hash of its draft model's weights."""
    spec = load_spec(path)
    return spec.model_copy(update={"draft": with_weights(spec.draft, path.parent)})


def listed(spec: RoutingSpec) -> list[CertifiedCandidate]:
    assert spec.certificate is not None
    assert spec.certificate.candidates is not None
    return spec.certificate.candidates


def edit(path: Path, change: Edit) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def of_candidate(number: int, *names: str, value: object) -> Edit:
    """Sets one entry of a listed candidate."""

    def change(document: dict[str, Any]) -> None:
        inner = document["certificate"]["candidates"][number]
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value

    return change


def audit_without_warnings(path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_engine(path).decoder().strategy.audit


def test_a_spec_as_it_was_exported_holds(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 0
    assert "(3 certified candidates)" in " ".join(capsys.readouterr().out.split())
    assert audit_without_warnings(path) == load_spec(path).decoding.audit


def test_each_candidate_is_a_policy_of_its_own_with_its_certificate(path: Path) -> None:
    spec = load_spec(path)
    found = [with_candidate(spec, one) for one in listed(spec)]
    assert [policy_digest(one) for one in found] == [one.digest for one in listed(spec)]
    assert [one.gates.accept_at for one in found] == [0.9, 0.6, 0.4]
    for one, candidate in zip(found, listed(spec), strict=True):
        assert one.certificate is not None
        assert (one.decoding.audit, one.certificate.bound, one.plan) == ("off", 0.1, None)
        assert (one.certificate.digest, one.certificate.losses) == (candidate.digest, candidate.losses)
        assert one.certificate.candidates == listed(spec), "it may be chosen among again"


EDITS: dict[str, tuple[Edit, str]] = {
    "accept_at": (of_candidate(2, "bounds", "accept_at", value=0.3), "gates (edited, or of another policy)"),
    "stop": (of_candidate(2, "bounds", "draft_stop_below", value=0.2), "gates (edited, or of another policy)"),
    "pending": (of_candidate(2, "decoding", "max_pending", value=30), "decoding (edited, or of another policy)"),
    "audit": (of_candidate(2, "decoding", "audit", value="tolerant"), "decoding (edited, or of another policy)"),
    "digest": (of_candidate(2, "digest", value="0" * 64), "the policy's digest"),
    "number format": (of_candidate(2, "dtype", value="bfloat16"), "certificate.dtype (bfloat16, certified float32)"),
    "kernels": (of_candidate(2, "backend", value="cpu native"), "certificate.backend"),
    "bound": (of_candidate(2, "bound", value=0.12), "the p-value is"),
    "p-value": (of_candidate(2, "p_value", value=0.01), "the p-value is"),
    "observed": (of_candidate(2, "observed", value=0.001), "the observed loss is"),
    "by token": (of_candidate(2, "observed_by_token", value=0.001), "the observed loss by token is"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS)
def test_an_edit_of_one_candidate_is_found_and_the_others_hold(
    path: Path, change: Edit, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spec does not decode by it, so that it loads as it did."""
    before = load_spec(path).decoding.audit
    edit(path, change)
    assert main(["validate", str(path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    third = listed(load_spec(path))[2]
    assert f"{third.name}: " in said
    assert message in said
    assert said.count("candidate ") == 1, "no other one is named"
    assert audit_without_warnings(path) == before


@pytest.mark.parametrize("way", ["missing", "edited", "one without a loss"])
def test_the_losses_of_each_must_be_there(path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    third = listed(load_spec(path))[2]
    losses = path.parent / third.losses.path
    if way == "missing":
        losses.unlink()
    else:
        content = json.loads(losses.read_text())
        content["losses"][0] = 0.0
        losses.write_text(json.dumps(content))
    if way == "one without a loss":  # the hash is edited, too
        edit(path, of_candidate(2, "losses", "sha256", value=file_sha256(losses)))
    before = load_spec(path).decoding.audit
    assert main(["validate", str(path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    wanted = {"missing": "cannot be read", "edited": "SHA-256 differs", "one without a loss": "the observed loss is"}
    assert f"{third.name}: " in said
    assert wanted[way] in said
    assert audit_without_warnings(path) == before


def test_gates_that_were_edited_are_those_of_all(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(path, lambda document: document["gates"]["slim"].update(bias=0.5))
    assert main(["validate", str(path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"{one.name}: the certificate was made for something else: gates" in said for one in
               listed(load_spec(path)))  # fmt: skip


def test_only_the_certificate_of_what_decodes_makes_a_spec_exact(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = drafted_spec(tiny_folder, tmp_path)
    spec = bind_candidates(known_draft(path), path, active=1)
    (tmp_path / listed(spec)[1].losses.path).unlink()
    with pytest.warns(CertificateWarning, match="cannot be read"):
        assert load_engine(path).decoder().strategy.audit == "strict"
    edit(path, lambda document: document["certificate"].update(candidates=document["certificate"]["candidates"][:1]))
    assert main(["validate", str(path)]) == 1
    assert "own policy is none of the candidates that it lists" in " ".join(capsys.readouterr().err.split())


def test_a_spec_of_an_earlier_release_lists_none(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    path = drafted_spec(tiny_folder, tmp_path)
    save_spec(load_spec(path).model_copy(update={"certificate": make_certificate(None)}), path)

    def earlier(document: dict[str, Any]) -> None:
        document["schema_version"] = "1.6"
        del document["certificate"]["candidates"]

    edit(path, earlier)
    spec = load_spec(path)
    assert spec.certificate is not None
    assert spec.certificate.candidates is None
    assert main(["validate", str(path)]) == 0
    assert SCHEMA_VERSION == "1.9"


def test_what_is_listed_changes_no_digest(path: Path) -> None:
    spec = load_spec(path)
    assert spec.certificate is not None
    without = spec.certificate.model_copy(update={"candidates": None})
    assert policy_digest(spec.model_copy(update={"certificate": without})) == policy_digest(spec)


def test_a_list_that_cannot_be_is_refused(path: Path) -> None:
    one = listed(load_spec(path))[0]
    with pytest.raises(ValidationError, match="one policy is listed twice"):
        make_certificate(None, candidates=[one, one])
    with pytest.raises(ValidationError, match="1 candidates are listed, and 0 were tested"):
        make_certificate(None, candidates=[one], candidates_tested=0)
    with pytest.raises(ValidationError, match="at least 1 item"):
        make_certificate(None, candidates=[])


def test_a_candidate_needs_a_certificate(path: Path) -> None:
    spec = load_spec(path)
    with pytest.raises(SpecError, match="no certificate"):
        with_candidate(spec.model_copy(update={"certificate": None}), listed(spec)[0])


PLAN = [PlanEntry(max_context=None, policy=PlannedPolicy(draft_length=2, max_pending=6))]


def test_a_plan_stands_beside_candidates_and_never_beside_a_certified_policy(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Either the plan is followed, exactly, or the certified policy; no spec says both."""
    path = drafted_spec(tiny_folder, tmp_path)
    certified = bind_candidates(load_spec(path), path, active=1)
    with pytest.raises(ValidationError, match=r"a plan is of exact decoding, and decoding.audit is 'off'"):
        RoutingSpec(**{**dict(certified), "plan": PLAN})
    exact = certified.decoding.model_copy(update={"audit": "strict"})
    with pytest.raises(ValidationError, match=r"the certificate bounds a loss \(0.1\) of another policy"):
        RoutingSpec(**{**dict(certified), "plan": PLAN, "decoding": exact})
    edit(path, lambda document: document.update(plan=[row.model_dump(mode="json") for row in PLAN]))
    with pytest.raises(SpecError, match="a plan is of exact decoding"):
        load_spec(path)

    planned = bind_candidates(load_spec(drafted_spec(tiny_folder, tmp_path)), path, active=None)
    save_spec(RoutingSpec(**{**dict(planned), "plan": PLAN}), path)
    assert main(["validate", str(path)]) == 0
    engine = load_engine(path)
    assert engine.decoder().strategy.takes_audit
    found, wanted = (engine.decoder(name).generate([5, 6, 7], 20) for name in ("three_tier", "autoregressive"))
    assert found.tokens == wanted.tokens
