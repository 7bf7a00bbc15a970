"""A command answers what it can without loading what takes seconds to load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import TinyFolder, tiny_spec
from viasd_calib.cli import COMMANDS
from viasd_calib.spec import CausalLMDraft, load_spec, save_spec

HEAVY = ("torch", "transformers", "lightning", "datasets", "sklearn", "matplotlib", "mapie", "numpy", "pyarrow")

PROGRAM = f"""
import contextlib, io, json, sys
from viasd_calib.cli import main

said = {{}}
for name, words in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    said[name] = [status, out.getvalue(), err.getvalue(), [heavy for heavy in {HEAVY} if heavy in sys.modules]]
print(json.dumps(said))
"""


def answers(runs: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str, str]]:
    """Status, output and messages of runs in one fresh process, none of which loads anything heavy."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(runs)], cwd=folder, capture_output=True, text=True, check=True
    )
    said: dict[str, tuple[int, str, str]] = {}
    for name, (status, out, err, heavy) in json.loads(done.stdout).items():
        assert heavy == [], f"viasd {' '.join(runs[name])} loads {', '.join(heavy)}"
        said[name] = (status, out, err)
    return said


PARSED = [name for name, command in COMMANDS.items() if name not in ("fit",)]


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    said = answers({name: [name, "--help"] for name in PARSED}, tmp_path)
    for name, (status, out, _) in said.items():
        assert status == 0, name
        assert out.startswith(f"usage: viasd {name}"), name


def test_wrong_input_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "task": "qa"}\n')
    (tmp_path / "cut.json").write_text('{"schema_version": ')
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "fit.json").write_text("{")
    bad, none = ["--prompts", "bad.jsonl"], ["--prompts", "none.jsonl"]
    cases = {
        "capture": ([*bad, "--out", "out"], "bad.jsonl, line 1"),
        "calibrate": (["--fit", "fit", *none, "--out", "out"], "fit/fit.json is damaged"),
        "bench": ([*none, "--spec", "cut.json", "--json", "bench.json"], "cut.json is not valid JSON"),
        "report": (["--spec", "cut.json", "--bench", "none.json", "--out", "page.html"], "run viasd bench first"),
        "route-quality": (["--spec", "cut.json", "--json", "out.json"], "cut.json is not valid JSON"),
        "search": (["--traces", "none", "--json", "out.json"], "none/capture.json"),
        "generate": (["--spec", "cut.json", "--prompt", "Why?"], "cut.json is not valid JSON"),
        "monitor": (["log.jsonl", "--spec", "cut.json"], "cut.json is not valid JSON"),
        "plan": (["--spec", "cut.json", "--traces", "t", "--out", "out.json"], "cut.json is not valid JSON"),
        "profile": (["--spec", "cut.json", "--json", "out.json", "--plot", "a.bmp"], "cannot draw a.bmp"),
        "export": (["--calibrate", "none", "--out", "out.json"], "none/calibrate.json"),
        "validate": (["cut.json"], "cut.json is not valid JSON"),
        "fit": (["--config", "none.yaml"], "none.yaml"),
        "frontier": (["--target-costs", "[0.5]", "--out", "bad.jsonl"], "bad.jsonl: it is a file"),
        "run": ([*none, "--out", "out", "--fit-config", "fit.yaml"], "cannot read prompts from none.jsonl"),
    }
    assert {*cases, "schema", "cache"} == {*COMMANDS}
    said = answers({name: [name, *words] for name, (words, _) in cases.items()}, tmp_path)
    for name, (_, message) in cases.items():
        status, _, err = said[name]
        assert status in (1, 2), name
        assert message in err, name


def test_settings_out_of_range_are_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    runs = {
        "generate": ["generate", "--spec", "s", "--prompt", "w1", "--temperature", "1e-38"],
        "capture": ["capture", "--out", "out", "--temperature", "1e-38"],
    }
    for status, _, err in answers(runs, tmp_path).values():
        assert status == 1
        assert "error: --temperature is 1e-38; give 0, which takes the most probable token, or 1e-30 to 1e+30" in err


def test_a_file_that_is_no_benchmark_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "junk.json").write_text('{"a": 1}')
    (tmp_path / "calibrate.json").write_text("{}")
    runs = {
        "report": ["report", "--spec", "spec.json", "--bench", "junk.json", "--out", "page.html"],
        "evidence": ["export", "--calibrate", ".", "--out", "out.json", "--evidence", "junk.json"],
    }
    for status, _, err in answers(runs, tmp_path).values():
        assert status == 1
        assert "junk.json is missing or not a benchmark's JSON; run viasd bench first" in err


def test_a_model_that_is_nowhere_is_refused_before_anything_heavy_is_loaded(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    spec = tiny_spec(tiny_folder, tmp_path)
    alone = load_spec(spec)
    (tmp_path / "drafting").mkdir()
    drafting = alone.model_copy(update={"draft": CausalLMDraft(name_or_path=str(tiny_folder))})
    save_spec(drafting, tmp_path / "drafting" / "routing.json")
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["w1"]}\n')
    of_spec, prompts = ["--spec", str(spec)], ["--prompts", "prompts.jsonl"]
    nowhere = {
        "generate": ["generate", *of_spec, "--prompt", "w1", "--verifier", "./nope"],
        "bench": ["bench", *of_spec, "--json", "o.json", "--verifier", "./nope", *prompts],
        "route-quality": ["route-quality", *of_spec, "--json", "o.json", "--verifier", "./nope", *prompts],
        "profile": ["profile", *of_spec, "--json", "o.json", "--verifier", "./nope"],
        "plan": ["plan", *of_spec, "--traces", "t", "--out", "o.json", "--verifier", "./nope"],
        "capture": ["capture", *prompts, "--split", "null", "--out", "o", "--verifier", "./nope"],
        "draft": ["capture", *prompts, "--split", "null", "--out", "o", "--draft", "int8:./nope"],
        "draft model": ["generate", "--spec", "drafting/routing.json", "--prompt", "w1", "--draft-model", "./nope"],
        "search": ["search", "--traces", "t", "--json", "o.json", "--verifier", "./nope"],
        "calibrate": ["calibrate", "--fit", "f", "--out", "o", "--verifier", "./nope"],
        "fit": ["fit", "--model.verifier", "./nope"],
        "export": ["export", "--calibrate", "c", "--out", "o.json", "--verifier", "./nope"],
        "validate": ["validate", str(spec), "--verifier", "./nope"],
        "frontier": ["frontier", "--target-costs", "[0.5]", "--out", "o", "--verifier", "./nope"],
        "run": ["run", "--out", "o", "--fit-config", "f.yaml", "--verifier", "./nope"],
    }
    for name, (status, _, err) in answers(nowhere, tmp_path).items():
        assert status == 1, name
        assert "cannot load the model './nope': there is no such folder; give a hub id, a folder" in err, name


@pytest.mark.parametrize("words", [["schema"], ["--version"], ["capture", "--out", "out", "--print_config"]])
def test_what_asks_no_model_is_answered_without_one(words: list[str], tmp_path: Path) -> None:
    ((status, out, err),) = answers({"asked": words}, tmp_path).values()
    assert (status, err) == (0, "")
    assert out


def test_a_wrong_option_is_refused_without_a_model(tmp_path: Path) -> None:
    runs = {
        "unknown": ["capture", "--out", "out", "--nonsense", "3"],
        "value": ["generate", "--spec", "a", "--prompt", "b", "--method", "foo"],
    }
    said = answers(runs, tmp_path)
    assert said["unknown"][0] == said["value"][0] == 2
    assert "--nonsense" in said["unknown"][2]
    assert "three_tier" in said["value"][2]


@pytest.mark.parametrize(
    ("words", "statuses"),
    # argparse itself lets a reader go, where its text is longer than what a stream holds back
    [("--help", {141}), ("--version", {141}), ("schema", {141}), ("bench --help", {0, 141})],
)
def test_a_reader_that_has_gone_is_no_complaint(words: str, statuses: set[int], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from viasd_calib.cli import main; sys.exit(main(sys.argv[1:]))"
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-c", program, *words.split()],
            cwd=tmp_path,
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode in statuses
    assert done.stderr == ""
