"""Which policy a spec gets: the fastest, unless its audit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_certificate
from tests.timings import make_policy, make_timing
from tests.tiny import constant_gate, verifier_ref
from viasd_calib.calibration.artifacts import CalibrateArtifact, FitArtifact, fit_beside, load_fit_of
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.errors import CalibrationError, SpecError
from viasd_calib.file_names import FIT_FILE
from viasd_calib.files import write_json
from viasd_calib.spec import Gates, Route

CERTIFIED = Gates(
    draft=constant_gate("draft_margin", 0.0), slim=constant_gate("slim_margin", 0.0), accept_at=0.9, regenerate_at=0.9
)
EXACT = CERTIFIED.model_copy(update={"accept_at": NEVER, "regenerate_at": NEVER})


def calibrated(bound: float | None, seconds: float | None) -> CalibrateArtifact:
    """A result with a policy certified at ``bound`` that takes ``seconds`` a token; exact decoding takes 0.02."""
    certificate = make_certificate(bound)
    timing = make_timing(0.03, 0.02, seconds)
    return CalibrateArtifact(
        fit="fit", gates=EXACT, certified_gates=CERTIFIED if bound else None, draft_length=6, max_pending=12,
        certificate=certificate, slim_worth=timing, tested=[],
    )  # fmt: skip


def test_a_certified_policy_that_is_faster_is_taken_with_its_certificate() -> None:
    result = calibrated(0.05, 0.01)
    assert result.policy() == ("off", CERTIFIED, result.certificate, 12, None)


def test_a_certified_policy_that_is_slower_is_taken_only_when_its_audit_is_named() -> None:
    result = calibrated(0.05, 0.04)
    audit, gates, certificate, *_ = result.policy()
    assert (audit, gates, certificate.bound) == ("strict", EXACT, None)
    assert "took 40.0 ms a token, this one 20.0" in certificate.note
    assert result.policy("off") == ("off", CERTIFIED, result.certificate, 12, None)


def test_exact_gates_never_bear_the_certificate_of_others() -> None:
    """Whoever turned the audit off would else run gates that nothing was shown of."""
    _, gates, certificate, *_ = calibrated(0.05, 0.01).policy("strict")
    assert (gates, certificate.bound, certificate.observed, certificate.p_value) == (EXACT, None, None, None)


def test_without_a_certificate_the_audit_is_strict() -> None:
    result = calibrated(None, None)
    assert result.policy() == ("strict", EXACT, result.certificate, 12, None)
    with pytest.raises(SpecError, match="nothing is certified"):
        result.policy("tolerant")


def write_fit(folder: Path, **changes: Any) -> FitArtifact:
    entries: dict[str, Any] = {
        "verifier": verifier_ref(), "draft": "prompt_lookup", "route": Route(), "draft_gate": CERTIFIED.draft,
        "slim_gate": CERTIFIED.slim, "reliability": {}, "agreement": 0.8, "fit_sha256": "f" * 64,
    }  # fmt: skip
    fitted = FitArtifact(**{**entries, **changes})
    write_json(folder / FIT_FILE, fitted)
    return fitted


def test_a_fit_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = write_fit(Path("runs/fit"))
    result = calibrated(0.05, 0.01).model_copy(update={"fit": fit_beside(Path("runs/fit"), Path("runs/calibrate"))})
    assert result.fit == "../fit"
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved" / "calibrate").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found, place = load_fit_of(result, tmp_path / "moved" / "calibrate")
    assert found == fitted
    assert place.resolve() == tmp_path / "moved" / "fit"


def test_results_of_earlier_releases_name_it_from_where_the_command_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = write_fit(Path("runs/fit"))
    result = calibrated(0.05, 0.01).model_copy(update={"fit": "runs/fit"})
    assert load_fit_of(result, Path("runs/calibrate")) == (fitted, Path("runs/fit"))
    monkeypatch.chdir("/")
    with pytest.raises(CalibrationError, match=r"of a fit that is not at .*runs/fit; .* with --fit where it is"):
        load_fit_of(result, tmp_path / "runs/calibrate")
    assert load_fit_of(result, tmp_path / "runs/calibrate", str(tmp_path / "runs/fit"))[0] == fitted


def test_another_fit_in_its_place_is_refused(tmp_path: Path) -> None:
    write_fit(tmp_path / "fit", slim_gate=constant_gate("slim_margin", 1.0))
    (tmp_path / "calibrate").mkdir()
    result = calibrated(0.05, 0.01).model_copy(update={"fit": "../fit"})
    with pytest.raises(CalibrationError, match=r"holds another fit than the one .* was made of"):
        load_fit_of(result, tmp_path / "calibrate")


def test_what_drafts_in_the_draft_models_place_is_that_of_the_fastest_exact_policy() -> None:
    """A certified policy was decoded with the draft model, and is exported with it."""
    result = calibrated(0.05, 0.04)
    policies = [
        make_policy(True, seconds, drafter=drafter, max_pending=bound)
        for drafter, bound, seconds in ((None, 12, 0.012), ("slim", 7, 0.011), ("lookup", 9, 0.013))
    ]
    timing = make_timing(0.011, 0.02, 0.04, policies=[*policies, make_policy(False, 0.02)])
    result = result.model_copy(update={"slim_worth": timing})
    assert [result.policy(audit).drafter for audit in (None, "strict", "off")] == ["slim", "slim", None]
    assert [result.policy(audit).max_pending for audit in (None, "strict", "off")] == [7, 7, 12]
