"""``make gpu`` loses nothing: whatever a step does, the record is whole, valid, and says what failed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu import harness, measure
from tests.gpu.conftest import check_of
from tests.gpu.harness import Step, run_step, run_steps
from tests.gpu.record import Check, CheckLog, GpuRecord, ReadLog, StepResult
from tests.gpu.settings import SETTINGS_VARIABLE, Settings
from tests.gpu.summary import summary
from tests.gpu.targets import SHIPPED, TINY, Target, find_targets, measured_targets, open_target
from viasd_calib.choices import BENCH_METHODS, STRATEGIES
from viasd_calib.decoding.strategies.base import load_strategy
from viasd_calib.errors import ModelError
from viasd_calib.evaluation.exactness import Difference

ROOT = Path(__file__).parents[2]
SMALL = Settings(device="cpu", small=True)

START = """
import json, os, signal, sys, time
def write(entry):
    with open(os.environ["VIASD_GPU_CHECKS"], "a") as out:
        out.write(json.dumps(entry) + chr(10))
def done(name, outcome="passed", **more):
    write({"done": {"name": name, "outcome": outcome, **more}})
write({"announced": ["one", "two", "three"]})
write({"begun": "one"})
done("one", numbers={"apart": 0.5})
write({"begun": "two"})
"""
"""A step whose first check has passed, and whose second runs."""
ALL = START + "done('two'); done('three')\n"
FAILS = START + "done('two', 'failed', reason='off by one'); done('three'); sys.exit(1)\n"
CRASHES = START + "print('illegal access', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
HANGS = START + "sys.stdin.read()\n"
"""Until whoever started it is gone."""


def step(script: str, name: str = "step", budget: float = 60.0, measures: bool = False) -> Step:
    return Step(name, [sys.executable, "-c", script], budget, measures)


def new_record(budget: float = 100.0) -> GpuRecord:
    machine = {"device": "abacus", "torch": "2.8"}
    return GpuRecord(began="today", commit="abc", machine=machine, models=[], budget=budget, steps=[])


def read(path: Path) -> GpuRecord:
    return GpuRecord.model_validate_json(path.read_text(encoding="utf-8"))


def outcomes(checks: list[Check]) -> list[str]:
    return [check.outcome for check in checks]


def test_a_record_holds_every_step_and_a_failed_check_is_an_exit_code_of_1(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    told: list[StepResult] = []
    steps = [step(ALL, "right"), step(FAILS, "wrong"), step(CRASHES, "crash"), step(ALL, "after")]
    record = run_steps(steps, new_record(), out, told.append)
    assert read(out) == record
    assert [one.name for one in told] == ["right", "wrong", "crash", "after"]
    assert [one.outcome for one in record.steps] == ["passed", "failed", "failed", "passed"]
    assert outcomes(record.steps[1].checks) == ["passed", "failed", "passed"]
    assert record.steps[0].checks[0].numbers == {"apart": 0.5}
    assert (record.exit_code, record.finished) == (1, True)
    crashed = record.steps[2]
    assert {check.name: check.outcome for check in crashed.checks} == {
        "one": "passed", "two": "failed", "three": "not run",
    }  # fmt: skip
    assert {check.reason for check in crashed.checks[1:]} == {"its process ended with code -9"}
    lines = [str(part) for part in summary(record)]
    assert "two: failed: off by one" in lines


def test_a_run_without_faults_is_an_exit_code_of_0(tmp_path: Path) -> None:
    assert run_steps([step(ALL)], new_record(), tmp_path / "gpu.json").exit_code == 0


def test_a_process_that_fails_beside_its_checks_has_failed() -> None:
    found = run_step(step(ALL + "sys.exit('no module named triton')"), 60)
    assert (found.outcome, found.count("passed")) == ("failed", 3)
    assert found.reason == "its process ended with code 1\nno module named triton"
    assert run_step(step("raise SystemExit(3)"), 60).outcome == "failed"
    assert run_step(step(""), 60).reason == "it has no checks"


@pytest.mark.parametrize(
    ("measures", "budget", "outcome", "exit_code"),
    [(False, 1.0, "failed", 1), (True, 1.0, "not run", 2), (False, 60.0, "not run", 2)],
    ids=["a check with its own time", "a measurement", "a check whose run ended"],
)
def test_what_hangs_is_stopped(measures: bool, budget: float, outcome: str, exit_code: int) -> None:
    """A check that hangs is a fault; one that the whole's time cut short, and a slow measurement, are none."""
    found = run_step(step(HANGS, budget=budget, measures=measures), 1.0)
    assert outcomes(found.checks) == ["passed", outcome, "not run"]
    assert found.checks[1].reason == "stopped after 1 s"
    record = new_record().model_copy(update={"steps": [found]})
    assert (found.stopped, record.exit_code) == (True, exit_code)


def test_steps_that_are_not_reached_say_why(tmp_path: Path) -> None:
    record = run_steps([step(ALL)], new_record(budget=harness.LEAST_SECONDS / 2), tmp_path / "gpu.json")
    assert record.steps[0].outcome == "not run"
    assert record.steps[0].reason == "the budget of 2.5 s was used up"
    assert record.exit_code == 2


KILLED = """
import sys
from pathlib import Path
from tests.gpu.harness import Step, run_steps
from tests.gpu.record import GpuRecord
out, first, second = sys.argv[1:]
steps = [Step(name, [sys.executable, "-c", script], 60) for name, script in (("first", first), ("second", second))]
run_steps(steps, GpuRecord(began="", commit=None, machine={}, models=[], budget=100, steps=[]), Path(out))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_what_was_done(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), ALL, HANGS], cwd=ROOT)
    try:
        until = time.monotonic() + 120
        while not (out.exists() and read(out).steps[0].outcome == "passed") and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    record = read(out)
    assert [one.outcome for one in record.steps] == ["passed", "not run"]
    assert record.steps[1].reason == "the run ended before it"
    assert not record.finished


def test_a_line_that_was_cut_is_none(tmp_path: Path) -> None:
    path = tmp_path / "checks.jsonl"
    log = CheckLog(path)
    log.announce(["one", "two"])
    log.begin("one")
    log.note(Check(name="one", outcome="passed"))
    path.write_text(path.read_text() + '{"done": {"na')
    read_again = ReadLog(path)
    assert ([check.name for check in read_again.done], read_again.running, read_again.waiting) == (
        ["one"],
        None,
        ["two"],
    )


@pytest.mark.slow
def test_tests_are_checks() -> None:
    """Through pytest in a process of its own, as `make gpu` runs it; on a device that calculates nothing."""
    words = next(one for one in command.all_steps(SMALL) if one.name == "low_bit").command
    settings = {SETTINGS_VARIABLE: Settings(device="meta").model_dump_json()}
    found = run_step(Step("low_bit", [*words, "-k", "later_token or 32-inputs"], 600, environment=settings), 600)
    failed, left_out = found.checks
    assert (failed.name, failed.outcome) == (
        "test_low_bit.py::test_what_a_token_gives_depends_on_no_later_token", "failed",
    )  # fmt: skip
    assert "meta" in str(failed.reason)
    assert (left_out.name, left_out.outcome, left_out.reason) == (
        "test_low_bit.py::test_int4_weights_of_a_draft_model[32-inputs]", "not run",
        "no kernel for int4 weights runs on device meta; leave quantize out",
    )  # fmt: skip
    assert (found.outcome, found.stopped) == ("failed", False)


def test_a_test_that_passes_is_a_check_with_its_numbers() -> None:
    name, location = "tests/gpu/test_x.py::test_y", ("tests/gpu/test_x.py", 1, "test_y")
    phases = [
        pytest.TestReport(name, location, {}, "passed", None, phase, duration=0.5, user_properties=[("apart", 0.1)])
        for phase in ("setup", "call", "teardown")
    ]
    assert check_of(phases) == Check(name="test_x.py::test_y", outcome="passed", seconds=1.5, numbers={"apart": 0.1})


def test_every_file_of_tests_is_a_step_and_every_model_is_measured() -> None:
    steps = command.all_steps(SMALL)
    files = {f"test_{name}.py" for name in command.CHECKS}
    assert files == {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {one.name for one in steps} == {*command.CHECKS, "profile tiny eager", "bench tiny eager"}
    assert command.BUDGET <= 8 * 60
    assert sum(command.CHECKS.values()) < command.BUDGET


def test_a_model_is_profiled_and_benchmarked(tmp_path: Path) -> None:
    log = CheckLog(tmp_path / "checks.jsonl")
    assert measure.measure("profile", TINY, "eager", SMALL, log)
    assert measure.measure("bench", TINY, "eager", SMALL, log)
    profiled, benched = ReadLog(tmp_path / "checks.jsonl").done
    assert {(one["tier"], one["width"], one["batch"]) for one in profiled.numbers["passes"]} >= {
        (tier, width, batch) for tier in ("full", "slim") for width in (1, 4) for batch in (1, 2)
    }
    methods = benched.numbers["methods"]
    assert set(methods) == set(BENCH_METHODS)
    lossless = [name for name in STRATEGIES if load_strategy(name).is_lossless("strict")]
    assert all(methods[name]["identical_to_autoregressive"] == 1 for name in lossless)


def test_a_measurement_that_fails_is_noted_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CheckLog(tmp_path / "checks.jsonl")
    other = Difference(prompt_id="p", turn=0, place=3, gap=9.0, near_tie=0.1)
    monkeypatch.setattr(measure, "unexplained", lambda result: [("speculative", other)])
    monkeypatch.setattr(measure, "BENCH_METHODS", ("autoregressive",))
    assert not measure.measure("bench", TINY, "eager", SMALL, log)
    assert not measure.measure("profile", TINY, "packed", SMALL.model_copy(update={"device": "cuda:99"}), log)
    differs, broken = ReadLog(tmp_path / "checks.jsonl").done
    assert outcomes([differs, broken]) == ["failed", "failed"]
    assert differs.reason == "speculative left the autoregressive text at token 3 of p, gap 9.0 (1 such texts)"
    assert list(differs.numbers["methods"]) == ["autoregressive"]
    assert "ModelError" in str(broken.reason)


def test_models_are_found_in_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    verifier, draft = (f"qwen2.5-coder-{size}-instruct-q4_k_m.gguf" for size in ("1.5b", "0.5b"))
    (tmp_path / draft).write_text("")
    names = [target.name for target in measured_targets(Settings(models=[str(tmp_path)]))]
    assert sorted(names) == sorted(["one", "two", draft])
    (tmp_path / verifier).write_text("")
    fitted = Target(
        verifier.removesuffix(".gguf"), str(tmp_path / verifier),
        str(SHIPPED / "qwen2.5-coder-1.5b" / "routing.json"), str(tmp_path / draft),
    )  # fmt: skip
    found = find_targets(Settings(models=[str(tmp_path)]))
    assert found[0] == Target(TINY)
    assert fitted in found
    assert {target.name for target in found} == {TINY, "one", "two", fitted.name}, (
        "a draft model is no target of its own"
    )
    with pytest.raises(ModelError, match=r"there is no model at .*none; give a folder"):
        find_targets(Settings(models=[str(tmp_path / "none")]))


def test_a_given_model_gets_a_spec_by_rule(tiny_folder: Path, tmp_path: Path) -> None:
    target = find_targets(Settings(models=[str(tiny_folder)]))[1]
    opened = open_target(target, tmp_path, torch.device("cpu"))
    document = json.loads(opened.spec.read_text())
    assert document["draft"]["kind"] == "prompt_lookup"
    assert document["route"]["attention_skip"]
    assert (opened.prompts, target.fitted) == ("embedded", False)


def test_what_is_not_there_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "gpu.json")
    assert command.main(["--device", "gpu", "--out", out]) == 2
    assert "write cuda" in capsys.readouterr().err
    assert command.main(["--device", "cpu", "--out", out, "--models", str(tmp_path / "none")]) == 2
    assert "there is no model at" in capsys.readouterr().err
    assert not Path(out).exists()
