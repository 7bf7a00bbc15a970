from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.tiny import TinyFolder, even_costs, tiny_fit, tiny_prompts, tiny_traces
from tests.tiny.bits import priced
from viasd_calib.calibration.artifacts import CalibrateArtifact, FitArtifact
from viasd_calib.cli import main
from viasd_calib.cli.frontier import frontier_table, parse_costs, parse_low_bits, parse_options
from viasd_calib.errors import CalibrationError, JobWarning
from viasd_calib.evaluation.frontier import load_frontier
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE, FRONTIER_FILE
from viasd_calib.files import read_json, write_json
from viasd_calib.pipeline.frontier import PICTURE, timing_dtype
from viasd_calib.slim.parts import low_bit
from viasd_calib.spec import LowBitWeights, Route
from viasd_calib.training import student


@pytest.fixture(scope="module")
def traces(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_traces(tiny_folder, tmp_path_factory.mktemp("traces"), 24, max_new_tokens=12, batch_size=12)


@pytest.fixture
def words(tiny_folder: TinyFolder, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of ``viasd frontier`` for two costs, on any machine the same routes."""
    monkeypatch.setattr(student, "sublayer_costs", even_costs)
    of_fit = tiny_fit(tiny_folder, [traces], tmp_path / "out")
    place = of_fit.index("--model.target_cost")
    return ["frontier", "--target-costs", "[0.8, 0.56]", *of_fit[:place], *of_fit[place + 2 :]]


def test_each_cost_has_a_fit_and_all_are_measured(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--debug"]) == 0
    out = tmp_path / "out"
    found = load_frontier(out)
    assert [member.folder for member in found.members] == ["cost-0.56", "cost-0.8"]
    for member in found.members:
        fitted = read_json(FitArtifact, out / member.folder / FIT_FILE, "viasd fit")
        assert member.attention_skip == fitted.route.attention_skip
        assert set(member.relative_cost) == {1, 4, 8}
        assert member.agreement == pytest.approx(fitted.agreement, abs=1e-4)
        assert set(member.agreement_confident) == {"0.5", "0.7", "0.9"}
    narrow, wide = found.members
    assert len(narrow.attention_skip) > len(wide.attention_skip) > 0
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "cost-0.56" in said
    assert f"wrote {out / FRONTIER_FILE}" in said


def test_low_bits_are_members_beside_the_others(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products in 4 bits take 0.7 of what those of 16 do, no bits can be chosen for 0.56 of a full pass."""
    monkeypatch.setattr(low_bit, "product_seconds", lambda *asked: {
        (shape, bits): seconds / bits * (9.6 + 0.4 * bits) for (shape, bits), seconds in priced(*asked).items()
    })  # fmt: skip
    assert main([*words, "--low_bits", "all", "--dtype", "float32", "--debug"]) == 0
    found = load_frontier(tmp_path / "out").members
    low = ["low-bit-8", "low-bit-4-mlp", "low-bit-4-mlp-gptq", "low-bit-8-span-0.56", "low-bit-8-span-0.8"]
    low.append("low-bit-auto-0.8")
    assert [member.folder for member in found] == ["cost-0.56", "cost-0.8", *low]
    by_name = {member.folder: member for member in found}
    assert by_name["low-bit-8"].low_bits == "all sublayers in 8 bits, head in 8 bits"
    assert by_name["low-bit-8"].target_cost is None
    assert by_name["low-bit-4-mlp"].low_bits == "4 sublayers in 8 bits, 4 sublayers in 4 bits, head in 8 bits"
    assert by_name["low-bit-4-mlp-gptq"].low_bits == f"{by_name['low-bit-4-mlp'].low_bits}, rounded by GPTQ"
    assert by_name["low-bit-8-span-0.8"].mlp_skip == by_name["cost-0.8"].mlp_skip
    assert by_name["low-bit-8-span-0.8"].low_bits == "all sublayers in 8 bits, head in 8 bits"
    assert by_name["low-bit-auto-0.8"].low_bits
    assert by_name["cost-0.8"].low_bits == ""
    said = " ".join(capsys.readouterr().err.split())
    assert "low-bit-auto-0.56 is left out: no choice of bits brings the cost" in said
    screen = io.StringIO()
    Console(file=screen, width=220).print(frontier_table(load_frontier(tmp_path / "out")))
    rows = {line.split()[0]: line.split() for line in screen.getvalue().splitlines() if line.split()}
    assert rows["low-bit-8"][-8:] == ["all", "sublayers", "in", "8", "bits,", "head", "in", "8", "bits"][-8:]
    assert rows["cost-0.8"][-1] == "none"


def test_low_bits_are_timed_where_they_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    low = Route(low_bit=LowBitWeights(head=8))
    monkeypatch.setattr("viasd_calib.slim.backends.low_bits_have_kernels", lambda *_: True)
    assert timing_dtype([Route()], "cpu") == "float32"
    with pytest.warns(JobWarning, match="timed in bfloat16, in which low bits have kernels here; --dtype float32"):
        assert timing_dtype([Route(), low], "cpu") == "bfloat16"
    monkeypatch.setattr("viasd_calib.slim.backends.low_bits_have_kernels", lambda *_: False)
    assert timing_dtype([Route(), low], "cpu") == "float32"


def test_members_in_low_bits_have_names() -> None:
    with pytest.raises(
        CalibrationError, match="there is no method '16'; choose from 8, 4_mlp, 4_mlp_gptq, 8_span, auto"
    ):
        parse_low_bits("8, 16")


def test_a_member_that_is_there_is_kept(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a run was killed between two members."""
    out = tmp_path / "out"
    assert main([*words, "--debug"]) == 0
    kept = (out / "cost-0.56" / FIT_FILE).read_bytes()
    marked = kept.replace(b'"agreement": 0', b'"agreement": 1')
    (out / "cost-0.56" / FIT_FILE).write_bytes(marked)
    (out / "cost-0.8" / FIT_FILE).unlink()
    assert main([*words, "--debug"]) == 0
    assert (out / "cost-0.56" / FIT_FILE).read_bytes() == marked != kept
    assert (out / "cost-0.8" / FIT_FILE).is_file()
    assert load_frontier(out).members[0].agreement >= 1


def test_calibrate_picks_from_a_frontier(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--debug"]) == 0
    out, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    found = load_frontier(out)
    dear = found.members[1].model_copy(update={"relative_cost": {4: 0.7}, "agreement": 0.9})
    cheap = found.members[0].model_copy(update={"relative_cost": {4: 0.5}, "agreement": 0.1})
    write_json(out / FRONTIER_FILE, found.model_copy(update={"members": [cheap, dear]}))
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(30)))
    common = ["calibrate", "--fit", str(out), "--prompts", str(prompts), "--max-new-tokens", "6", "--limit", "4"]
    common += ["--allow-uncertified", "true"]
    for cost, folder in (("0.6", "cost-0.56"), ("0.75", "cost-0.8")):
        assert main([*common, "--cost", cost, "--out", str(tmp_path / cost), "--debug"]) == 0
        chosen = read_json(CalibrateArtifact, tmp_path / cost / CALIBRATE_FILE, "viasd calibrate")
        assert (tmp_path / cost / chosen.fit).resolve() == (out / folder).resolve()
    capsys.readouterr()
    assert main([*common, "--cost", "0.4", "--out", str(tmp_path / "none")]) == 1
    assert "no member of the frontier has a measured cost of at most 0.4" in capsys.readouterr().err


def test_what_is_not_its_own_is_for_fit() -> None:
    words = ["--config", "a.yaml", "--out", "b", "--trainer.max_epochs", "-1", "--target_costs", "[1]", "--model.x=3"]
    options, rest = parse_options(words)
    assert (options.out, options.target_costs, options.low_bits, options.dtype) == ("b", "[1]", "", None)
    assert rest == ["--config", "a.yaml", "--trainer.max_epochs", "-1", "--model.x=3"]


@pytest.mark.parametrize("words", ["", "0.5", "[]", "[0]", "[0.5, 1.2]", "[0.5", '["a"]', "[NaN]"])
def test_costs_that_cannot_be_are_refused(words: str) -> None:
    with pytest.raises(CalibrationError, match="give a JSON list of shares"):
        parse_costs(words)


@pytest.mark.parametrize("word", ["--model.target_cost", "--ckpt_path"])
def test_options_that_differ_by_member_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([word, "0.5"], [f"{word}=0.5"]):
        assert main(["frontier", "--target_costs", json.dumps([0.5]), "--out", "x", *words]) == 1
        assert word in capsys.readouterr().err
    assert not Path("x").exists()
