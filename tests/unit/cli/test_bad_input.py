"""Kinds of bad input, each with the exit status and the message it gets: one line that names the thing and the mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import TinyFolder, tiny_spec
from viasd_calib.cli import main

SHIPPED = "checkpoints/smollm2-135m/routing.json"
CAPTURE = ["capture", "--prompts", "good.jsonl", "--out", "out"]
BENCH = ["bench", "--prompts", "good.jsonl", "--spec", "spec/routing.json", "--json", "bench.json"]
GENERATE = ["generate", "--spec", "spec/routing.json", "--prompt", "w1"]
CALIBRATE = ["calibrate", "--fit", "fit", "--out", "out"]
RUN = ["run", "--prompts", "good.jsonl", "--out", "out", "--fit-config", "good.yaml"]
PROFILE = ["profile", "--spec", "spec/routing.json", "--json", "p.json"]
SEARCH = ["search", "--traces", "traces", "--json", "out.json"]

FIT = ["fit", "--data.folders", "[fine]"]

CASES: list[tuple[str, list[str], int, str]] = [
    # words
    ("mistyped command", ["captre"], 2, "there is no command 'captre'; did you mean capture?"),
    ("unknown command", ["xyzzy"], 2, "there is no command 'xyzzy' (see viasd --help)"),
    ("mistyped option", [*GENERATE, "--show-tirs"], 2, "no option --show-tirs; did you mean --show-tiers?"),
    ("unknown option", [*GENERATE, "--xyzzy", "1"], 2, "there is no option --xyzzy (see viasd generate --help)"),
    ("missing option", ["capture"], 2, "--out is missing; give it"),
    ("missing argument", ["validate"], 2, "spec is missing; give it"),
    ("option without value", ["capture", "--out"], 2, "--out needs a value"),
    ("value too many", [*CAPTURE, "a", "b"], 2, "'a' stands after no option; give each value after"),
    ("name of what has none", ["validate", "--spec", SHIPPED], 2, "spec is given without its name; write SPEC"),
    ("name of logs", ["monitor", "--files", "a.jsonl", "--spec", SHIPPED], 2, "write FILES in place of --files FILES"),
    ("spec without its name", ["generate", SHIPPED, "--prompt", "w1"], 2, f"after no option; write --spec {SHIPPED}"),
    ("prompts without their name", ["capture", "good.jsonl", "--out", "o"], 2, "write --prompts good.jsonl (see"),
    # values
    ("word for a number", [*CAPTURE, "--limit", "x"], 2, "--limit is 'x'; give a whole number, at least 1, or null"),
    ("fraction for a count", [*CAPTURE, "--max-new-tokens", "1.5"], 2, "--max-new-tokens is '1.5'; give a whole"),
    ("nothing to take", [*CAPTURE, "--limit", "0"], 2, "--limit is '0'; give a whole number, at least 1"),
    ("negative count", [*CAPTURE, "--batch-size=-1"], 2, "--batch-size is '-1'; give a whole number, at least 1"),
    ("block of none", [*CAPTURE, "--draft-length", "0"], 2, "--draft-length is '0'; give a whole number, at least 1"),
    ("negative seed", [*GENERATE, "--seed=-1"], 2, "give a whole number at least 0 and below 2**64"),
    ("huge seed", [*GENERATE, "--seed", str(2**64)], 2, "--seed is '18446744073709551616'; give a whole number"),
    ("nan", [*GENERATE, "--top-p", "nan"], 2, "--top-p is 'nan'; give a number above 0 and at most 1"),
    ("inf", [*GENERATE, "--temperature", "inf"], 2, "--temperature is 'inf'; give a finite number, at least 0"),
    ("too cold", [*GENERATE, "--temperature", "1e-38"], 1, "--temperature is 1e-38; give 0, which takes the most prob"),
    ("too cold to capture", [*CAPTURE, "--temperature", "1e-38"], 1, "--temperature is 1e-38; give 0, which takes the"),
    ("too large a penalty", [*GENERATE, "--repetition-penalty", "1e31"], 1, "--repetition-penalty is 1e+31; give more"),
    ("above one", [*CALIBRATE, "--max-loss", "2"], 2, "--max-loss is '2'; give a number above 0 and below 1"),
    ("certainty", [*CALIBRATE, "--confidence", "1"], 2, "--confidence is '1'; give a number above 0 and below 1"),
    ("too long a draft", [*CALIBRATE, "--draft-length", "99"], 2, "give a whole number, at least 0 and at most 64"),
    ("number for a list", [*CALIBRATE, "--fractions", "0.3"], 2, "--fractions is '0.3'; give a list"),
    ("wrong item in a list", [*CALIBRATE, "--fractions", "[0.1,7]"], 2, "each a number above 0 and at most 1"),
    ("no such choice", [*GENERATE, "--audit", "loose"], 2, "--audit is 'loose'; give one of strict, tolerant, off"),
    ("no such format", [*CAPTURE, "--dtype", "int3"], 2, "give one of float32, bfloat16, float16"),
    ("no such split", [*CAPTURE, "--split", "train"], 2, "--split is 'train'; give one of fit, calibrate, test"),
    ("word for a flag", [*GENERATE, "--show-tiers=maybe"], 2, "--show-tiers is 'maybe'; give true or false"),
    ("memory without offload", [*CAPTURE, "--memory", "1GB"], 2, "--memory bounds what --offload reads; give"),
    ("no number of bytes", [*CAPTURE, "--offload", "disk", "--memory", "lots"], 2, "--memory is 'lots'; give bytes"),
    ("no bandwidth", [*CAPTURE, "--offload", "disk", "--bandwidth", "0"], 2, "--bandwidth is 0; give bytes"),
    ("a spec and layers read apart", [*CAPTURE, "--offload", "disk", "--spec", SHIPPED], 2, "leave out --spec, or"),
    ("shares beyond one", [*CAPTURE, "--shares.fit", "0.6"], 2, "sum to 1.2; give all three"),
    ("unknown share", [*CAPTURE, "--shares", '{"dev": 1}'], 2, "--shares has no entry 'dev'; it takes an object with"),
    ("wrong nested option", [*RUN, "--capture-step.limit", "0"], 2, "--capture-step.limit is '0'; give a whole number"),
    ("wrong nested entry", [*RUN, "--bench-step", '{"limit": 0}'], 2, "--bench-step.limit is '0'; give a whole number"),
    ("nested list", [*RUN, "--calibrate-step.fractions", "[7]"], 2, "fractions is '[7]'; give a list, '[..., ...]'"),
    ("nested flag", [*RUN, "--calibrate-step.allow-uncertified", "no?"], 2, "is 'no?'; give true or false"),
    ("number for nested options", [*RUN, "--capture-step", "3"], 2, "--capture-step is '3'; give an object with limit"),
    ("unknown nested option", [*RUN, "--capture-step.xyzzy", "0"], 2, "--capture-step has no entry 'xyzzy'; it takes"),
    ("wrong share", [*CAPTURE, "--shares.fit", "2"], 2, "--shares.fit is '2'; give a number, at least 0 and at most 1"),
    ("word for an object", [*GENERATE, "--chat-template-kwargs", "x"], 2, "is 'x'; give an object, '{\"name\": val"),
    ("no such method", [*BENCH, "--methods", "magic"], 1, "there is no method 'magic'; choose from autoregressive"),
    ("no method", [*BENCH, "--methods", ""], 1, "choose from autoregressive"),
    ("batch of none", [*BENCH, "--batch", "0"], 1, "--batch is 0; give whole numbers, at least 1, as 1,4,16"),
    ("word for a batch", [*BENCH, "--batch", "1,x"], 1, "--batch is '1,x'; give whole numbers, at least 1, as 1,4"),
    ("no batch", [*BENCH, "--batch", ""], 1, "--batch is ''; give whole numbers, at least 1"),
    ("transformers in a batch", [*BENCH, "--batch", "4", "--methods", "transformers"], 1, "one text at a time; leave"),
    ("too few prompts for a batch", [*BENCH, "--batch", "4,64"], 1, "--batch 64 takes as many prompts at least"),
    ("audit of a method without", [*GENERATE, "--method", "speculative", "--audit", "off"], 1, "three_tier alone"),
    ("audit of methods without", [*BENCH, "--methods", "speculative", "--audit", "off"], 1, "three_tier alone"),
    ("number for a part", [*FIT, "--model.parts", '{"constants": 3}'], 2,
     "--model.parts is '3', or holds it; give an object of objects, '{\"name\": {\"option\": value}}'"),
    ("list of parts", [*FIT, "--model.parts", "[1]"], 2, "--model.parts is '[1]', or holds it; give an object of obj"),
    ("list for shares", [*FIT, "--data.shares", "[1, 2]"], 2, "is '[1, 2]'; give an object with fit, calibrate, test"),
    ("number for shares", [*FIT, "--data.shares", "3"], 2, "--data.shares is '3'; give an object with fit, calibrate"),
    # configurations
    ("absent configuration", ["capture", "--config", "none.yaml"], 2, "none.yaml: No such file or directory; give"),
    ("folder as configuration", ["capture", "--config", "spec"], 2, "spec: Is a directory; give --config the path"),
    ("no YAML", ["capture", "--config", "broken.yaml"], 2, "broken.yaml, line 1: no valid YAML"),
    ("entry twice", ["capture", "--config", "twice.yaml"], 2, "line 2: out stands there twice; leave one of them"),
    ("list for entries", ["capture", "--config", "list.yaml"], 2, "list.yaml has no entries; write one a line"),
    ("unknown entry", ["capture", "--config", "unknown.yaml"], 2, "has an entry 'outt', which is no option of this"),
    ("wrong type in it", ["capture", "--config", "typed.yaml"], 2, "--limit is '[1]'; give a whole number"),
    ("wrong nested type in it", [*RUN, "--config", "nested.yaml"], 2, "--capture-step.limit is '0'; give a whole num"),
    ("configuration of another command", ["capture", "--config", "run.yaml"], 2, "an entry 'fit_config', which is no"),
    # timing
    ("width of nothing", [*PROFILE, "--widths", "[0]"], 1, "--widths is [0]; give a list, '[..., ...]', each a whole"),
    ("no contexts", [*PROFILE, "--contexts", "[]"], 1, "--contexts is []; give a list, '[..., ...]', each a whole"),
    ("one repeat", [*PROFILE, "--repeats", "1"], 1, "--repeats is 1; give a whole number, at least 2"),
    # paths
    ("empty out", ["capture", "--out", ""], 1, "--out is empty; give the path of a folder"),
    ("file for a folder", ["capture", "--out", "good.jsonl"], 1, "it is a file; give --out the path of a folder"),
    ("folder for a file", [*BENCH[:-1], "spec"], 1, "cannot write spec: it is a folder; give --json the path"),
    ("below a file", ["capture", "--out", "good.jsonl/a"], 1, "good.jsonl is not a folder; choose another path"),
    ("links in a circle", ["validate", "circle.json"], 1, "circle.json"),
    ("empty spec", ["generate", "--spec", "", "--prompt", "w1"], 1, "--spec is empty; give the path of a routing"),
    ("absent spec", ["validate", "none.json"], 1, "none.json"),
    ("folder for a spec", ["validate", "spec"], 1, "spec: Is a directory"),
    ("truncated spec", ["validate", "cut.json"], 1, "cut.json is not valid JSON"),
    ("list for a spec", ["validate", "list.json"], 1, "its top level must be a JSON object"),
    ("prompts for a spec", ["validate", "good.jsonl"], 1, "good.jsonl"),
    ("what was not shipped", ["validate", "checkpoints/none/routing.json"], 1, "there is no checkpoints/none/routing"),
    ("picture of no kind", ["profile", "--spec", "spec/routing.json", "--json", "p.json", "--plot", "a.bmp"], 1,
     "cannot draw a.bmp: its ending names no kind of picture; choose one of .png"),
    # models
    ("absent verifier", [*GENERATE, "--verifier", "./nope"], 1, "cannot load the model './nope': there is no such fol"),
    ("verifier in a folder that is there", [*BENCH, "--verifier", "spec/nope"], 1, "model 'spec/nope': there is no"),
    ("verifier of a home", [*CAPTURE, "--verifier", "~/no/such"], 1, "'~/no/such': there is no such folder; give"),
    ("file for a verifier", [*CAPTURE, "--verifier", "good.jsonl"], 1, "'good.jsonl': it is a file; give the folder"),
    ("empty verifier", [*GENERATE, "--verifier", ""], 1, "cannot load the model '': the name is empty; give a hub id"),
    ("absent GGUF file", ["search", "--traces", "a", "--json", "o", "--verifier", "m.GGUF"], 1, "no GGUF file at"),
    ("name that nobody has", [*GENERATE, "--verifier", "nobody/nothing"], 1, "HF_HUB_OFFLINE forbids to: unset it"),
    ("draft model for none", [*GENERATE, "--draft-model", "a"], 1, "prompt_lookup, which names no model; leave out"),
    ("absent drafter", [*CAPTURE, "--draft", "prompt_lookup+int8:./nope"], 1, "the model './nope': there is no such"),
    ("absent verifier of a fit", ["fit", "--model.verifier", "./nope"], 1, "the model './nope': there is no such fol"),
    # prompts
    ("absent prompts", ["capture", "--out", "out", "--prompts", "none.jsonl"], 1, "none.jsonl"),
    ("blank prompt", ["generate", "--spec", "spec/routing.json", "--prompt", " "], 1, "--prompt is empty; give it"),
    ("blank sample", [*RUN, "--sample-prompt", ""], 1, "--sample-prompt is empty; give it some text"),
    ("argument that we give", [*GENERATE, "--chat-template-kwargs", '{"tokenize": 1}'], 1, "hold tokenize, which the"),
    ("number for a name", [*GENERATE, "--chat-template-kwargs", "{1: 2}"], 1, "-template-kwargs has the key 1, not"),
    ("NUL in a prompt", [*GENERATE[:-1], "a\0"], 1, "--prompt holds a NUL character"),
    ("no Parquet", ["capture", "--out", "out", "--prompts", "table.parquet"], 1, "not a Parquet file, though its name"),
    ("no gzip", ["capture", "--out", "out", "--prompts", "packed.jsonl.gz"], 1, "it is not compressed with gzip, thou"),
    ("wrong row", ["capture", "--out", "out", "--prompts", "row.csv"], 1, "it should be as 1 under the heading turns"),
    ("two lists", ["capture", "--out", "out", "--prompts", "lists.json"], 1, "but 'train' holds a list: give its entr"),
    ("audit without a spec", [*CAPTURE, "--audit", "off", "--split", "null"], 1, "give --spec too, or leave"),
    # what other steps write
    ("absent fit", ["calibrate", "--fit", "none", "--out", "out"], 1, "run viasd fit first, or mend --fit"),
    ("damaged fit", CALIBRATE, 1, "fit/fit.json is damaged"),
    ("fit for a frontier", [*CALIBRATE, "--cost", "0.5"], 1, "fit/frontier.json: No such file or directory; run viasd"),
    ("absent calibration", ["export", "--calibrate", "none", "--out", "a.json"], 1, "run viasd calibrate first"),
    ("absent benchmark", ["report", "--spec", "spec/routing.json", "--bench", "none", "--out", "a.html"], 1,
     "run viasd bench first, or mend --bench"),
    ("absent traces", SEARCH, 1, "traces/capture.json: No such file or directory; run viasd capture first"),
    ("no traces", ["search", "--traces", ",", "--json", "o"], 1, "--traces is empty; give the folder that viasd"),
    ("no such search", [*SEARCH, "--methods", "magic"], 1, "there is no method 'magic'; choose from span"),
    ("no target costs", ["frontier", "--target-costs", "0.5", "--out", "out"], 1, "give a JSON list of shares"),
    # training
    ("negative fit seed", ["fit", "--seed-everything", "-3"], 1, "--seed-everything is -3; give a whole number"),
    ("half precision", ["fit", "--trainer.precision", "16-true"], 1, "give 32-true, bf16-mixed or, on a GPU, 16"),
    ("runs of nothing", ["fit", "--model.max-run", "0"], 2, "--model.max-run is '0'; give a whole number, at least 1"),
    ("bridges of rank 0", ["fit", "--model.bridge-rank", "0"], 2, "give a whole number, at least 1, or null"),
    ("no texts for bridges", ["fit", "--model.bridge-texts", "0"], 2, "--model.bridge-texts is '0'; give a whole"),
    ("adapter of rank -1", ["fit", "--model.adapter-rank=-1"], 2, "--model.adapter-rank is '-1'; give a whole number"),
    ("less than no cache", ["fit", "--model.cache-gib=-1"], 2, "--model.cache-gib is '-1'; give a finite number, at"),
    ("nan to learn by", ["fit", "--model.adapter-learning-rate", "nan"], 2, "is 'nan'; give a finite number, at least"),
    ("all held back", [*FIT, "--data.validation-share", "2"], 1, "validation_share is 2.0; give a number at least 0"),
    ("empty batches", [*FIT, "--data.max-batch-tokens", "0"], 1, "data.max_batch_tokens is 0; give a whole number, at"),
    ("no such device", [*FIT, "--trainer.accelerator", "tpux"], 1, "--trainer.accelerator is 'tpux'; give one of auto"),
    ("fraction of a step", ["fit", "--trainer.max-steps", "1.5"], 1, "--trainer.max-steps is 1.5; give a whole number"),
    ("falling fractions", [*CALIBRATE, "--fractions", "[0.5,0.1]"], 2, "each larger than the one before"),
    ("no steps", ["fit", "--trainer.max-steps", "0"], 1, "--trainer.max-steps is 0, so nothing would be learned"),
    ("absent checkpoint", ["fit", "--ckpt-path", "none.ckpt"], 1, "there is no checkpoint none.ckpt; give --ckpt-path"),
    ("rounds and a checkpoint", ["fit", "--rounds", "2", "--ckpt-path", "a"], 1, "leave out --ckpt-path"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec, prompts, and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "spec").mkdir()
    tiny_spec(tiny_folder, folder / "spec")
    prompts = [{"id": str(number), "task": "qa", "turns": [f"w{number}"]} for number in range(20)]
    files = {
        "good.jsonl": "".join(f"{json.dumps(prompt)}\n" for prompt in prompts),
        "good.yaml": "trainer: {max_steps: 1}\n",
        "broken.yaml": "a: b: c\n",
        "twice.yaml": "out: a\nout: b\n",
        "list.yaml": "- out\n",
        "unknown.yaml": "outt: a\n",
        "nested.yaml": "capture_step: {limit: 0}\n",
        "table.parquet": "",
        "packed.jsonl.gz": "",
        "row.csv": "turns\n[1]\n",
        "lists.json": '{"train": [{}], "test": [{}]}',
        "typed.yaml": "out: a\nlimit: [1]\n",
        "run.yaml": "out: a\nfit_config: b\n",
        "cut.json": '{"schema_version": ',
        "list.json": "[]",
        "fit/fit.json": "{",
        "fine/capture.json": "{}",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "circle.json").symlink_to("circle.json")
    return folder


@pytest.mark.parametrize(("words", "status", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_gets_one_clear_message(
    words: list[str], status: int, message: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    assert main(words) == status
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message in said
    assert "--debug" not in line, "a mistake of the user's, not ours"
    assert not (place / "out").exists()


def test_each_case_is_of_a_kind_of_its_own() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 40
    assert len({tuple(words) for _, words, *_ in CASES}) == len(CASES)
