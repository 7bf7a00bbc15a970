"""Which texts of a log are evidence, and when a bound is called exceeded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.certificates import make_certificate
from tests.logs import WATCH, logged
from tests.tiny import small_spec
from viasd_calib.calibration.exceedance import ExceedanceTest
from viasd_calib.calibration.monitor import Monitor, MonitorReport, watched
from viasd_calib.calibration.text_log import LoggedText
from viasd_calib.digest import policy_digest
from viasd_calib.errors import CalibrationError
from viasd_calib.spec import Decoding, PromptHashes


def report(texts: list[LoggedText], **settings: Any) -> MonitorReport:
    run = Monitor(WATCH, **settings)
    for line, text in enumerate(texts, 1):
        run.add(text, f"log, line {line}")
    return run.report()


def test_texts_within_the_bound_hold() -> None:
    found = report([logged(number, number % 2) for number in range(200)])
    assert (found.answer, found.n_texts, found.exceeded_at) == ("holds_so_far", 200, None)
    assert found.mean_loss == pytest.approx(0.05)
    assert found.e_value < 1
    assert found.p_value > found.level


def test_the_text_at_which_the_bound_is_exceeded_is_named_and_stays() -> None:
    departures = [0] * 5 + [4] * 10 + [0] * 80
    found = report([logged(number, departed) for number, departed in enumerate(departures)])
    test, at = ExceedanceTest(WATCH.bound), None
    for number, departed in enumerate(departures, 1):
        test.add(departed / 10)
        at = number if at is None and test.p_value <= 0.05 else at
    assert at is not None
    assert found.answer == "exceeded"
    assert found.exceeded_at is not None
    assert (found.exceeded_at.text, found.exceeded_at.where) == (at, f"log, line {at}")
    assert found.exceeded_at.e_value >= 20
    assert found.e_value < 20 <= found.largest_e_value == pytest.approx(1 / found.p_value)  # later texts are better
    stricter = report([logged(number, departed) for number, departed in enumerate(departures)], level=1e-9)
    assert stricter.answer == "holds_so_far"


def test_texts_that_are_no_evidence_are_left_out_and_counted() -> None:
    texts = [
        logged(1, 1),
        logged(2, audit="strict"),
        logged(1, 10),
        logged(3),
        logged(2, 3),
        logged(0, 9, prompt="f" * 16),
    ]
    found = report(texts)
    assert found.left_out == {"strict": 1, "repeated": 1, "made_from": 1}
    assert (found.n_texts, found.mean_loss) == (3, pytest.approx(0.4 / 3))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"policy": "b" * 64}, r"policy bbbbbbbbbbbb \(the spec's is aaaaaaaaaaaa\)"),
        ({"audit": "tolerant"}, r"audit tolerant \(the spec's is off\)"),
        ({"loss": "any_divergence"}, r"loss any_divergence \(the spec's is token_divergence\)"),
        ({"rounding_gap": 0.5}, r"rounding_gap 0.5 \(the spec's is 0.01\)"),
    ],
)
def test_texts_of_other_specs_are_refused_or_skipped(changes: dict[str, Any], complaint: str) -> None:
    texts = [logged(1), logged(2, 10, **changes)]
    with pytest.raises(CalibrationError, match=rf"^log, line 2 is of another spec: {complaint}; give the spec"):
        report(texts)
    found = report(texts, skip_others=True)
    assert (found.n_texts, found.left_out) == (1, {"other_policy": 1})


def test_nothing_logged_is_no_mean() -> None:
    found = report([])
    assert (found.mean_loss, found.answer) == (None, "holds_so_far")
    assert (found.e_value, found.p_value) == pytest.approx((1, 1))


@pytest.mark.parametrize("level", [0, 1, float("nan")])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    with pytest.raises(CalibrationError, match="give one above 0 and below 1"):
        Monitor(WATCH, level)


def test_what_is_watched_is_what_the_certificate_says() -> None:
    hashes = PromptHashes(fit=["1" * 16], calibrate=None)
    spec = small_spec(
        decoding=Decoding(audit="tolerant"), certificate=make_certificate(0.03, loss="divergence"), prompts=hashes
    )
    found = watched(spec)
    entries: dict[str, Any] = {"audit": "tolerant", "bound": 0.03, "rounding_gap": 0.0, "made_from": hashes.all}
    assert found == replace(WATCH, policy=policy_digest(spec), **entries)


@pytest.mark.parametrize("certificate", [None, make_certificate(None), make_certificate(0.03)])
def test_a_spec_that_certifies_nothing_or_decodes_exactly_is_refused(certificate: Any) -> None:
    with pytest.raises(CalibrationError, match="certifies no loss bound, so none can be exceeded"):
        watched(small_spec(certificate=certificate))
