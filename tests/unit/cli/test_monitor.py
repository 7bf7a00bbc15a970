"""``viasd generate --log`` and ``viasd monitor``: from texts to an answer, with a fall back, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import bind
from tests.logs import logged
from tests.tiny import TinyFolder, small_gates, tiny_spec
from viasd_calib.calibration.text_log import LoggedText, append_text, read_log
from viasd_calib.cli import main
from viasd_calib.digest import policy_digest
from viasd_calib.prompt_copies import SHORT, normalised_sha256
from viasd_calib.prompts import Prompt
from viasd_calib.spec import Decoding, Route, load_spec

TURNS = [f"w{number % 10} w{number // 10}" for number in range(1, 13)]


@pytest.fixture
def spec(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    """A spec whose certificate is wrong: the slim verifier may decide whatever it likes, and 10 % are certified."""
    path = tiny_spec(tiny_folder, tmp_path)
    plain = load_spec(path)
    gates = small_gates(accept_at=0.4, regenerate_at=0.4)
    route, decoding = Route(attention_skip=[0, 1, 2], mlp_skip=[1]), Decoding(drafter="slim", max_pending=4)
    bind(plain.model_copy(update={"gates": gates, "route": route, "decoding": decoding}), path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": turn, "turns": [turn]}) + "\n" for turn in TURNS))
    return path


def generate(spec: Path, *words: str) -> list[str]:
    return ["generate", "--spec", str(spec), "--max-new-tokens", "8", *words]


def test_texts_are_logged_and_the_bound_is_found_exceeded(
    spec: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = str(tmp_path / "log.jsonl"), tmp_path / "found.json"
    assert main(generate(spec, "--prompts", str(prompts), "--log", log)) == 0
    told = capsys.readouterr()
    answers = [json.loads(line) for line in told.out.splitlines()]
    assert [one["id"] for one in answers] == TURNS
    assert all(len(one["answers"]) == 1 and one["answers"][0] for one in answers)
    texts = [text for _, text in read_log(log).texts]
    assert [text.prompt for text in texts] == [normalised_sha256(Prompt(id="a", turns=[one]))[:SHORT] for one in TURNS]
    assert {text.policy for text in texts} == {policy_digest(load_spec(spec))}
    assert {(text.audit, text.loss, text.rounding_gap) for text in texts} == {("off", "token_divergence", 0.01)}

    assert main(["monitor", log, "--spec", str(spec), "--json", str(out)]) == 1
    shown, found = capsys.readouterr(), json.loads(out.read_text())
    at = found["exceeded_at"]["text"]
    assert (found["answer"], found["n_texts"], found["bound"]) == ("exceeded", len(TURNS), 0.1)
    assert found["mean_loss"] == pytest.approx(sum(text.value for text in texts) / len(texts))
    assert f"exceeded since text {at}" in shown.out
    said = "the certified bound of 0.1 on token_divergence is exceeded"
    assert f"error: {said} since text {at} ({log}, line {at})" in shown.err
    assert f"notice: {said} at text {at} ({log}, line {at})" in told.err
    assert "--fallback strict would decode exactly from here on" in told.err


def test_what_follows_is_decoded_exactly_and_a_later_run_goes_on(
    spec: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(tmp_path / "log.jsonl")
    words = ["--prompts", str(prompts), "--log", log, "--fallback", "strict"]
    assert main(generate(spec, *words, "--limit", "2")) == 0
    assert "exceeded" not in capsys.readouterr().err  # two texts are no evidence yet
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(prompts.read_text().splitlines(keepends=True)[2:]))
    words[1] = str(rest)
    assert main(generate(spec, *words)) == 0
    told = capsys.readouterr()
    texts = [text for _, text in read_log(log).texts]
    audits = [text.audit for text in texts]
    at = audits.index("strict")
    assert 2 < at < len(TURNS)
    assert audits == ["off"] * at + ["strict"] * (len(TURNS) - at)
    assert f"is exceeded at text {at} ({log}, line {at}): e-value " in told.err
    assert ", 20 needed; texts are decoded with audit strict from here on" in told.err
    assert all(text.departures == 0 for text in texts[at:])

    written = [json.loads(line)["answers"][0] for line in told.out.splitlines()][at - 2 :]
    assert main(generate(spec, "--prompts", str(rest), "--audit", "strict")) == 0
    exact = [json.loads(line)["answers"][0] for line in capsys.readouterr().out.splitlines()][at - 2 :]
    assert written == exact

    assert main(generate(spec, "--prompt", "w5 w5", "--log", log, "--fallback", "strict")) == 0  # begins exactly
    told = capsys.readouterr()
    assert f"exceeded at text {at} ({log}, line {at})" in told.err
    assert read_log(log).texts[-1][1].audit == "strict"
    assert main(["monitor", log, "--spec", str(spec)]) == 1
    assert "left out: decoded exactly" in capsys.readouterr().out


def test_a_streamed_answer_is_the_same_with_a_log(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, log = generate(spec, "--prompt", "w3 w4"), tmp_path / "log.jsonl"
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--log", str(log)]) == 0
    assert capsys.readouterr().out == plain
    ((_, text),) = read_log(log).texts
    assert text.tokens == 8
    assert main([*words, "--show-tiers", "--log", str(log)]) == 0
    tiers = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert [place for place, tier in enumerate(tiers) if tier in ("accept", "regenerate")] == text.turns[0].pending


def of_spec(spec: Path, number: int, departed: int, **changes: Any) -> LoggedText:
    return logged(1000 + number, departed, policy=policy_digest(load_spec(spec)), **changes)


def test_several_logs_are_one_stream_and_unfinished_lines_are_named(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number in range(40):
        append_text(logs[number // 20], of_spec(spec, number, number % 2))
    logs[0].write_bytes(logs[0].read_bytes()[:-5])
    out = tmp_path / "found.json"
    assert main(["monitor", *map(str, logs), "--spec", str(spec), "--json", str(out)]) == 0
    told, found = capsys.readouterr(), json.loads(out.read_text())
    assert f"notice: {logs[0]}, line 20 does not end, a process was stopped while it wrote it: it is" in told.err
    assert (found["answer"], found["n_texts"]) == ("holds_so_far", 39)
    assert found["unfinished"] == [f"{logs[0]}, line 20"]
    assert "holds so far" in told.out


def test_lines_of_other_policies_are_refused_or_skipped(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    append_text(log, of_spec(spec, 0, 0))
    append_text(log, logged(1, 9))
    for words in (["monitor", str(log), "--spec", str(spec)], generate(spec, "--prompt", "w1", "--log", str(log))):
        assert main(words) == 1
        assert "line 2 is of another spec: policy aaaaaaaaaaaa (the spec's is " in capsys.readouterr().err
    assert main(["monitor", str(log), "--spec", str(spec), "--skip-others"]) == 0
    assert "left out: of other specs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["--prompt", "w1", "--fallback", "strict"], 2, "follows from the texts of a log; give --log FILE too"),
        (["--prompt", "w1", "--log", "l", "--method", "speculative"], 1, "which is of three_tier, and not speculative"),
        (["--prompt", "w1", "--log", "l", "--temperature", "0.5"], 1, "--log judges texts that are greedy"),
        (["--prompt", "w1", "--log", "l", "--top-k", "3"], 1, "--log judges texts that are greedy"),
        (["--prompt", "w1", "--log", "l", "--audit", "tolerant"], 1, "the certificate to be watched is of audit off"),
        (["--prompt", "w1", "--log", "l", "--max-new-tokens", "9"], 1, "is of texts of at most 8; ask for as few"),
        (["--prompt", "w1", "--log", "l", "--dtype", "bfloat16"], 1, "the spec's certificate is void with what is"),
        (["--prompt", "w1", "--log", "."], 1, "cannot write .: it is a folder; give --log the path of a file"),
        (["--prompt", "w1", "--log", "broken.jsonl"], 1, "broken.jsonl, line 1 is no text of a log"),
        (["--prompt", "w1", "--log", "l", "--level", "1"], 2, "--level is '1'; give a number above 0 and below 1"),
        (["--prompt", "w1", "--prompts", "p"], 2, "give --prompt or --prompts, one of them"),
        (["--prompts", "p", "--system", "w1"], 2, "--system is for --prompt alone; leave it out with --prompts"),
        (["--prompts", "p", "--show-tiers"], 2, "--show-tiers is for --prompt alone"),
        (["--prompts", "none.jsonl"], 1, "none.jsonl"),
        ([], 2, "--prompt is missing; give it, or --prompts with a file of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused(
    words: list[str], status: int, complaint: str, spec: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text("{}\n")
    assert main(generate(spec, *words)) == status
    assert complaint in capsys.readouterr().err
    assert not Path("l").exists()


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["l", "--spec", "exact/routing.json"], 1, "the spec certifies no loss bound, so none can be exceeded"),
        (["l", "--spec", "none.json"], 1, "none.json"),
        (["l", "--spec", " "], 1, "--spec is empty"),
        (["l", "--spec", "routing.json"], 1, "l is missing; viasd generate --log writes one"),
        (["--spec", "routing.json"], 2, "there is no log to read; give the path of a file"),
        (["l"], 2, "--spec is missing; give it"),
        (["l", "--spec", "routing.json", "--json", "."], 1, "cannot write .: it is a folder; give --json the path"),
        (["l", "--spec", "routing.json", "--level", "0"], 2, "--level is '0'; give a number above 0 and below 1"),
    ],
)
def test_what_cannot_be_monitored_is_refused(
    words: list[str], status: int, complaint: str, spec: Path, tiny_folder: TinyFolder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("exact").mkdir()
    tiny_spec(tiny_folder, Path("exact"))
    assert main(["monitor", *words]) == status
    assert complaint in capsys.readouterr().err
