"""Attempts on the same prompts are counted, and split the error among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.certificates import make_certificate
from viasd_calib.calibration.attempts import Attempt, earlier_attempts, note_attempt
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import ATTEMPTS_FILE
from viasd_calib.schema.certificate import level_of


def attempt(*prompts: str) -> Attempt:
    return Attempt(loss="token_divergence", max_loss=0.02, prompts=list(prompts))


def test_attempts_on_the_same_prompts_are_counted(tmp_path: Path) -> None:
    assert note_attempt(tmp_path, attempt("a", "b")) == 1
    assert note_attempt(tmp_path, attempt("c")) == 1, "a fresh split"
    assert note_attempt(tmp_path, attempt("b", "d")) == 2, "one prompt in common is enough"
    assert [earlier_attempts(tmp_path, prompts) for prompts in (["a"], ["b"], ["c"], ["e"])] == [1, 2, 1, 0]
    assert note_attempt(tmp_path, attempt("e"), least=4) == 4, "three were made elsewhere"


def test_all_attempts_together_keep_the_level() -> None:
    assert sum(level_of(0.95, number) for number in range(1, 60)) == pytest.approx(0.05)
    assert level_of(0.95, None) == pytest.approx(0.05), "of an earlier release, which counted none"
    assert make_certificate(attempt=1, p_value=0.02).level == pytest.approx(0.025)
    with pytest.raises(ValueError, match=r"a p-value of 0\.02 does not show the bound with confidence 0\.95"):
        make_certificate(attempt=2, p_value=0.02)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS_FILE).write_text("{")
    with pytest.raises(CalibrationError, match=ATTEMPTS_FILE):
        note_attempt(tmp_path, attempt("a"))
