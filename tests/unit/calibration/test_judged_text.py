"""What is logged of a text is what calibration would have made of it."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.cases import lively_case
from tests.logs import WATCH
from tests.tiny import tiny_model
from viasd_calib.calibration.judged_text import logged_text
from viasd_calib.calibration.judging import JudgedPrompt, judge
from viasd_calib.calibration.losses import base
from viasd_calib.calibration.losses.base import CertificateLoss, loss_named
from viasd_calib.calibration.text_log import LoggedText
from viasd_calib.choices import CERTIFICATE_LOSSES
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.conversation import Turn
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.errors import CalibrationError
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Audit

PROMPT = Prompt(id="a", turns=["w1", "w2"])


@functools.cache
def answered(audit: Audit, *, judged: bool = True) -> list[tuple[RoutedModel, list[Turn]]]:
    """Four texts of two turns, by tiny verifiers in float32."""
    found = []
    for seed in range(4):
        case = lively_case(seed)
        verifier = RoutedModel(tiny_model(seed % 4), case.route)
        decoder = Decoder(verifier, case.drafter, case.named(audit), judge=judged)
        asked = [case.prompt, [*case.prompt, seed, 2]]
        found.append((verifier, [Turn(ids, decoder.generate(ids, case.count)) for ids in asked]))
    return found


@pytest.mark.parametrize("loss", CERTIFICATE_LOSSES)
@pytest.mark.parametrize("audit", ["off", "tolerant"])
def test_logged_losses_are_those_that_calibration_measures(audit: Audit, loss: str) -> None:
    """Each of them, text by text; deficits of float32 differ by rounding, which ``rounding_gap`` is above."""
    watch, values = replace(WATCH, audit=audit, loss=loss), []
    for verifier, turns in answered(audit):
        text = logged_text(watch, audit, PROMPT, turns)
        judged = judge(verifier, PROMPT, turns, watch.rounding_gap)
        assert text.value == pytest.approx(loss_named(loss).of_prompt(judged), abs=1e-6)
        assert text.departures == int(judged.diverged.sum())
        values.append(text.value)
    # It looks at something. What audit tolerant keeps is half as probable as q's choice, or more: no overshoot.
    assert (sum(values) > 0) == (audit == "off" or not loss.startswith("overshoot"))


def test_a_line_says_of_each_pending_token_whether_it_is_the_full_verifiers_choice() -> None:
    _, turns = answered("off")[0]
    text = logged_text(WATCH, "off", PROMPT, turns)
    for turn, line in zip(turns, text.turns, strict=True):
        deficits = turn.generation.deficits
        assert deficits is not None
        assert line.pending == [place for place, tier in enumerate(turn.generation.tiers) if tier is not Tier.ESCALATE]
        assert line.departed == [place for place, deficit in enumerate(deficits) if deficit > WATCH.rounding_gap]
        assert line.deficits == [deficits[place] for place in line.departed]
        assert line.tokens == len(turn.generation.tokens)
    assert text.departures > 0
    assert LoggedText.model_validate_json(text.model_dump_json()) == text


def test_exact_texts_have_no_departures_by_construction() -> None:
    for _, turns in answered("strict"):
        text = logged_text(WATCH, "strict", PROMPT, turns)
        assert (text.audit, text.departures, text.value) == ("strict", 0, 0.0)
        assert any(line.pending for line in text.turns)


def test_a_text_that_was_not_judged_is_refused() -> None:
    _, turns = answered("off", judged=False)[0]
    with pytest.raises(CalibrationError, match=r"prompt 'a' was not judged; decode it .* with a decoder that judges"):
        logged_text(WATCH, "off", PROMPT, turns)


def compared(judged: JudgedPrompt) -> float:
    return float(len(str(judged.prompt.reference["answer"])) > torch.inf)  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("of_prompt", "complaint"),
    [
        (compared, r"loss own cannot be computed from the audits of the answer to prompt 'a' \(TypeError: .*alone$"),
        (lambda _: 2.0, r"loss own of prompt 'a' is 2.0, not in \[0, 1\]"),
        (lambda _: float("nan"), "is nan, not in"),
    ],
)
def test_a_loss_that_audits_do_not_give_is_named(
    of_prompt: base.PromptLoss, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own, which compares answers with references, on a prompt that has none."""
    monkeypatch.setitem(base._losses, "own", CertificateLoss(of_prompt, "own", "own"))
    _, turns = answered("off")[0]
    with pytest.raises(CalibrationError, match=complaint):
        logged_text(replace(WATCH, loss="own"), "off", PROMPT, turns)
