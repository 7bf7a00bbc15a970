"""What commands print at their end."""

from __future__ import annotations

import pytest

from tests.tiny import constant_gate, verifier_ref
from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.calibration.reliability import Reliability
from viasd_calib.cli.fit import say_fit
from viasd_calib.cli.notices import say_written
from viasd_calib.spec import HeadVocab, LowBitWeights, RelativeCost, Route, TensorFile

RECORD = Reliability(
    expected_calibration_error=0.0123, auroc=0.81, confidence=[0.1, 0.9], accuracy=[0.2, 0.8], count=[1000, 234]
)


def test_fit_says_what_was_learned(capsys: pytest.CaptureFixture[str]) -> None:
    gate = constant_gate("draft_margin", 0.0)
    say_fit(
        FitArtifact(
            verifier=verifier_ref(num_layers=8), draft="prompt_lookup", route=Route(attention_skip=[1, 2, 3, 6]),
            draft_gate=gate, slim_gate=gate, reliability={"draft": RECORD, "slim": RECORD}, agreement=0.43214,
            fit_sha256="0" * 64,
        )
    )  # fmt: skip
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["attention", "4", "of", "8", "1-3,", "6"] in rows
    assert ["MLP", "8", "of", "8", "none"] in rows
    assert ["draft", "0.0123", "–", "–", "1,234", "–"] in rows
    assert ["AUROC:", "draft", "gate", "0.81,", "slim", "gate", "0.81"] in rows
    assert ["agreement", "of", "slim", "and", "full", "verifier:", "0.4321"] in rows


def test_fit_says_what_a_reduced_head_costs(capsys: pytest.CaptureFixture[str]) -> None:
    gate = constant_gate("draft_margin", 0.0)
    head = HeadVocab(size=8192, tensors=TensorFile(path="head_vocab.safetensors", sha256="0" * 64))
    say_fit(
        FitArtifact(
            verifier=verifier_ref(vocab_size=49152), draft="prompt_lookup", route=Route(head_vocab=head),
            draft_gate=gate, slim_gate=gate, reliability={"draft": RECORD}, agreement=0.4, fit_sha256="0" * 64,
            outside_head_vocab=0.01234,
        )
    )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "kept, 8,192 output tokens" in said
    assert "choice, of 49,152 tokens, is none of the slim verifier's at 0.0123 of held-back places" in said


def test_fit_says_what_a_pass_of_low_bits_costs(capsys: pytest.CaptureFixture[str]) -> None:
    gate = constant_gate("draft_margin", 0.0)
    cost = RelativeCost(measured={1: 0.512, 4: 0.634, 8: 0.7}, device="cpu", dtype="bfloat16")
    say_fit(
        FitArtifact(
            verifier=verifier_ref(num_layers=8), draft="prompt_lookup",
            route=Route(low_bit=LowBitWeights(head=8), relative_cost=cost), draft_gate=gate, slim_gate=gate,
            reliability={"draft": RECORD}, agreement=0.4, fit_sha256="0" * 64,
        )
    )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "cost of a slim pass: 0.51 at width 1, 0.63 at width 4, 0.70 at width 8" in said
    assert "measured; cpu, bfloat16" in said


def test_where_a_result_is_stands_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = "runs/" + "long/" * 40 + "[out].json"
    say_written(path, "3 texts")
    say_written(path)
    assert capsys.readouterr().out == f"wrote {path}: 3 texts\nwrote {path}\n"
