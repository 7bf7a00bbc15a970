"""What ``viasd calibrate`` writes and prints of a result, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_certificate
from tests.timings import make_timing
from tests.tiny import TinyFolder, constant_gate, even_costs, tiny_fit, tiny_prompts, tiny_traces
from viasd_calib.calibration.artifacts import CalibrateArtifact
from viasd_calib.calibration.certify import TestedCandidate
from viasd_calib.cli import calibrate as command
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import CALIBRATE_FILE
from viasd_calib.files import read_json
from viasd_calib.pipeline import calibrate as job
from viasd_calib.pipeline.options import CalibrateOptions
from viasd_calib.pipeline.plan_certified import listed_candidates, refuse_other_than_certified
from viasd_calib.prompts import split_sha256
from viasd_calib.spec import GateBounds, Gates, RoutingSpec, load_spec
from viasd_calib.training import student

GATES = Gates(
    draft=constant_gate("draft_margin", 0.0), slim=constant_gate("slim_margin", 0.0), accept_at=0.9, regenerate_at=0.9
)


def result(bound: float | None, without: float, n_prompts: int = 8) -> CalibrateArtifact:
    """A result whose slim tier takes 20 ms a token, decoding without it ``without`` seconds."""
    tested = TestedCandidate(
        bound=0.9123, replayed_loss=0.004, replayed_trust=0.5, observed_loss=0.0031, n_prompts=150, p_value=0.012,
        full_passes_per_token=0.345,
    )  # fmt: skip
    timing = make_timing(0.02, without, 0.01 if bound else None, n_prompts)
    return CalibrateArtifact(
        fit="fit", gates=GATES, certified_gates=GATES if bound else None, draft_length=6, max_pending=12,
        certificate=make_certificate(bound), slim_worth=timing, tested=[tested],
    )  # fmt: skip


def printed(artifact: CalibrateArtifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(job, "calibrate", lambda *_: artifact)
    command.calibrate(CalibrateOptions(fit="fit", out="out"))
    return " ".join(capsys.readouterr().out.split())


def test_a_certified_policy_that_is_faster_is_said_to_be_exported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = printed(result(0.05, without=0.03), monkeypatch, capsys)
    assert "1 0.9123 0.0040 0.0031 150 0.012 0.34" in said
    assert "certified: at most 0.05 of a text's tokens" in said
    assert "takes 20.0 ms a token with the slim tier (threshold 0.70), 30.0 without: it is kept (1.50 [1.50" in said
    assert "the certified policy takes 10.0 ms a token" in said
    assert "exported with audit off" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"without": 0.01}, "it is left out (0.50 [0.50, 0.50] of the speed on 8 prompts)"),
        ({"without": 0.03, "n_prompts": 2}, "it is left out, as 2 prompts are too few to show that it pays"),
    ],
)
def test_a_slim_tier_that_does_not_pay_is_said_to_be_left_out(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = printed(result(None, **changes), monkeypatch, capsys)
    assert words in said
    assert "exported with audit strict" in said
    assert "certified:" not in said


def test_a_result_is_said_to_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(result(None, without=0.01), monkeypatch, capsys).endswith("wrote out/calibrate.json")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-loss", "1.5", "--max-loss is '1.5'; give a number above 0 and below 1"),
        ("--loss", "shame", "--loss is 'shame'; give one of any_divergence, overshoot"),
        ("--limit", "0", "--limit is '0'; give a whole number, at least 1, or null"),
    ],
)
def test_what_cannot_be_is_refused(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--fit", str(tmp_path), "--out", str(tmp_path / "out"), option, value]) == 2
    assert message in capsys.readouterr().err


def words_of_calibrate(
    verifier: TinyFolder, folder: Path, monkeypatch: pytest.MonkeyPatch, fractions: str = "[0.5, 1]"
) -> list[str]:
    """Words of ``viasd calibrate`` for a fit that is made in ``folder``, on four prompts that it has not seen."""
    monkeypatch.setattr(student, "sublayer_costs", even_costs)
    traces = tiny_traces(verifier, folder / "traces", 16, max_new_tokens=12, batch_size=16)
    assert main(["fit", *tiny_fit(verifier, [traces], folder / "fit"), "--debug"]) == 0
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(20)[16:]))
    return [
        "calibrate", "--fit", str(folder / "fit"), "--out", str(folder / "out"), "--prompts", str(prompts),
        "--shares", json.dumps({"fit": 0.0, "calibrate": 1.0, "test": 0.0}), "--max-loss", "0.9",
        "--max-new-tokens", "6", "--draft-length", "4", "--fractions", fractions,
    ]  # fmt: skip


def test_what_is_tested_and_timed_is_written_and_printed(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss of 0.9 on 4 prompts holds for the most careful candidate whatever it diverges."""
    monkeypatch.setenv("COLUMNS", "200")
    words, out, others = words_of_calibrate(tiny_folder, tmp_path, monkeypatch), tmp_path / "out", tiny_prompts(20)[16:]
    capsys.readouterr()
    assert main([*words, "--debug"]) == 0
    told = capsys.readouterr()
    found = read_json(CalibrateArtifact, out / CALIBRATE_FILE, "viasd calibrate")
    assert [path.name for path in out.iterdir()] == [CALIBRATE_FILE], "what was noted of steps is gone"
    assert (out / found.fit).resolve() == (tmp_path / "fit").resolve()
    certificate = found.certificate
    assert (certificate.bound, certificate.n_prompts, certificate.max_new_tokens) == (0.9, 4, 6)
    assert certificate.split_sha256["calibrate"] == split_sha256(others)
    assert certificate.candidates_tested == len(found.tested)
    assert certificate.observed in [one.observed_loss for one in found.tested]
    assert found.certified_gates is not None
    assert (found.draft_length, found.max_pending) == (4, 24)
    rows = [line.split() for line in told.out.splitlines() if len(line.split()) == 7 and line.split()[0].isdigit()]
    assert rows == [
        [str(number), f"{one.bound:.4f}", f"{one.replayed_loss:.4f}", f"{one.observed_loss:.4f}", str(one.n_prompts),
         f"{one.p_value:.3g}", f"{one.full_passes_per_token:.2f}"]
        for number, one in enumerate(found.tested, start=1)
    ]  # fmt: skip
    printed = " ".join(told.out.split())
    decoded = next(one for one in found.tested if one.observed_loss == certificate.observed)
    assert f"confidence 0.95, observed {certificate.observed:.4f} on {decoded.n_prompts} of 4 prompts" in printed
    assert f"({decoded.observed_by_token:.4f} of all tokens, which is not bounded)" in printed
    assert found.floor is not None
    assert (found.floor.loss, found.floor.n_prompts) == (certificate.floor, 4)
    assert found.floor.rounding_gap == certificate.rounding_gap < 1e-4, "decoded in float32"
    assert f"exact decoding comes to a loss of {found.floor.loss:.4f}" in printed
    timing = found.slim_worth
    assert not timing.pays, "four prompts are too few to say"
    fastest = timing.fastest_without_slim
    assert fastest.policy.drafter is None, "nor to leave the drafter out"
    assert (found.gates.accept_at, found.gates.draft_accept_at) == (NEVER, NEVER), "plain speculative decoding"
    assert found.gates.draft_stop_below == fastest.policy.stop_below
    assert 4 <= len(timing.policies) <= 10
    for one in timing.policies:
        predicted, measured = timing.speedup(one) or (0, 0)
        cells = f"{1000 * one.seconds_per_token:.1f} {1000 * one.predicted:.1f} {measured:.2f} {predicted:.2f}"
        assert f"{one.policy.kind} {cells} " in printed
    assert str(timing.prediction_words()) in printed
    without = f"{1000 * timing.decision.without_slim:.1f} without"
    assert timing.decision.baselines.keys() == {"speculative", "no drafting"}
    assert f"speculative {1000 * timing.decision.baselines['speculative']:.1f} ms" in printed
    assert f"{without}: it is left out, as 4 prompts are too few to show that it pays" in printed
    assert f"The spec will be exported with audit {found.policy().audit}." in printed
    assert printed.endswith(f"wrote {out / CALIBRATE_FILE}")
    assert (certificate.attempt, found.losses is not None) == (1, True)
    assert certificate.p_value is not None
    assert certificate.p_value <= 0.025
    assert main([*words, "--debug"]) == 0
    assert "notice: this is attempt 2 on these calibrate prompts" in " ".join(capsys.readouterr().err.split())
    again = read_json(CalibrateArtifact, out / CALIBRATE_FILE, "viasd calibrate").certificate
    assert again.attempt == 2
    assert again.p_value is not None
    assert again.p_value <= 0.0125


def test_every_candidate_that_passed_is_written_exported_and_checked(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss of 0.9 holds for several candidates, of which the last alone was kept."""
    words = words_of_calibrate(tiny_folder, tmp_path, monkeypatch, "[0.01, 0.1, 0.2, 0.3]")
    assert main([*words, "--debug"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = read_json(CalibrateArtifact, tmp_path / "out" / CALIBRATE_FILE, "viasd calibrate")
    level, candidates = found.certificate.level, found.candidates
    assert candidates is not None
    assert len(candidates) == sum(1 for one in found.tested if one.p_value <= level) > 1
    assert f"{len(candidates)} of {len(found.tested)} candidates are certified; the spec lists them all" in printed
    for one, tested in zip(candidates, found.tested, strict=False):
        assert one.bounds.accept_at == tested.bound
        assert (one.observed, one.p_value) == (tested.observed_loss, tested.p_value)
        assert one.observed_by_token == pytest.approx(tested.observed_by_token)
        assert len(one.losses.losses) == tested.n_prompts
    last = candidates[-1]
    assert (last.digest, last.losses) == (found.certificate.digest, found.losses)
    assert found.certified_gates is not None
    assert last.bounds == GateBounds.of(found.certified_gates)

    def exported(*more: str) -> RoutingSpec:
        path = tmp_path / "spec" / "mine.json"
        assert main(["export", "--calibrate", str(tmp_path / "out"), "--out", str(path), *more]) == 0
        assert main(["validate", str(path)]) == 0
        return load_spec(path)

    for audit, bound in (("strict", None), ("off", 0.9)):
        certificate = exported("--audit", audit).certificate
        assert certificate is not None
        assert certificate.bound == bound
        listed = certificate.candidates
        assert listed is not None
        assert [one.digest for one in listed] == [one.digest for one in candidates]
        assert [one.losses.path for one in listed] == [f"certificate/mine-{one.digest[:12]}.json" for one in listed]
        assert certificate.losses == (listed[-1].losses if bound else None), "one file for each policy"
    path, spec = tmp_path / "spec" / "mine.json", exported("--audit", "strict")
    offered = listed_candidates(str(path), spec, None)
    refuse_other_than_certified(load_engine(path), spec, path.parent, offered)
    assert [one.digest for one in offered] == [one.digest for one in candidates], "a plan here may choose any of them"
    capsys.readouterr()
    other = exported("--audit", "strict", "--dtype", "bfloat16").certificate
    assert other is not None
    assert other.candidates is None
    assert f"certified {last.name} is not listed, these differ" in " ".join(capsys.readouterr().err.split())


def test_a_pending_bound_without_room_for_a_block_is_refused_first(tmp_path: Path) -> None:
    """The slim verifier would never be asked, and nothing would say so."""
    options = CalibrateOptions(fit="no/fit", out=str(tmp_path), draft_length=8, max_pending=8)
    with pytest.raises(CalibrationError, match=r"--max-pending 8 leaves no room for a block of --draft-length 8"):
        job.calibrate(options)
