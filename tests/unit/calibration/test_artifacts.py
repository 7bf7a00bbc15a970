"""Which policy a spec gets: the fastest, unless its audit is named."""

from __future__ import annotations

import pytest

from tests.certificates import make_certificate
from tests.tiny import constant_gate
from viasd_calib.calibration.artifacts import CalibrateArtifact
from viasd_calib.calibration.worth import SlimWorth, without_slim
from viasd_calib.errors import SpecError
from viasd_calib.spec import Gates

CERTIFIED = Gates(
    draft=constant_gate("draft_margin", 0.0), slim=constant_gate("slim_margin", 0.0), accept_at=0.9, regenerate_at=0.9
)
EXACT = without_slim(CERTIFIED)


def calibrated(bound: float | None, seconds: float | None) -> CalibrateArtifact:
    """A result with a policy certified at ``bound`` that takes ``seconds`` a token; exact decoding takes 0.02."""
    certificate = make_certificate(bound)
    worth = SlimWorth(
        by_bound={0.5: 0.03}, seconds_per_token_without=0.02, seconds_per_token_certified=seconds, n_prompts=8
    )
    return CalibrateArtifact(
        fit="fit", gates=EXACT, certified_gates=CERTIFIED if bound else None, draft_length=6, max_pending=12,
        certificate=certificate, slim_worth=worth, tested=[],
    )  # fmt: skip


def test_a_certified_policy_that_is_faster_is_taken_with_its_certificate() -> None:
    result = calibrated(0.05, 0.01)
    assert result.policy() == ("off", CERTIFIED, result.certificate)


def test_a_certified_policy_that_is_slower_is_taken_only_when_its_audit_is_named() -> None:
    result = calibrated(0.05, 0.04)
    audit, gates, certificate = result.policy()
    assert (audit, gates, certificate.bound) == ("strict", EXACT, None)
    assert "took 40.0 ms a token, this one 20.0" in certificate.note
    assert result.policy("off") == ("off", CERTIFIED, result.certificate)


def test_exact_gates_never_bear_the_certificate_of_others() -> None:
    """Whoever turned the audit off would else run gates that nothing was shown of."""
    _, gates, certificate = calibrated(0.05, 0.01).policy("strict")
    assert (gates, certificate.bound, certificate.observed, certificate.p_value) == (EXACT, None, None, None)


def test_without_a_certificate_the_audit_is_strict() -> None:
    result = calibrated(None, None)
    assert result.policy() == ("strict", EXACT, result.certificate)
    with pytest.raises(SpecError, match="nothing is certified"):
        result.policy("tolerant")
