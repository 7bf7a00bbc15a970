"""Commands that were stopped go on where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TinyFolder, tiny_prompts, tiny_spec
from viasd_calib import cli
from viasd_calib.cli import main
from viasd_calib.evaluation import bench
from viasd_calib.evaluation.bench import load_bench
from viasd_calib.prompts import Prompt

PROMPTS = 4


@pytest.fixture
def command(tiny_folder: TinyFolder, tmp_path: Path) -> list[str]:
    spec, prompts = tiny_spec(tiny_folder, tmp_path / "spec"), tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(prompt.model_dump_json() for prompt in tiny_prompts(PROMPTS)) + "\n")
    words = ["bench", "--spec", str(spec), "--json", str(tmp_path / "bench.json"), "--prompts", str(prompts)]
    return [*words, "--max_new_tokens", "4", "--debug"]


class Stopped:
    """Counts the prompts that are answered, and is interrupted before one of them."""

    def __init__(self, answer: Callable[..., Any], before: int | None) -> None:
        self.answer = answer
        self.before = before
        self.answered = 0

    def __call__(self, *arguments: Any) -> Any:
        if self.answered == self.before:
            raise KeyboardInterrupt
        self.answered += 1
        return self.answer(*arguments)


def test_a_bench_that_was_stopped_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = bench._answer
    first, second = Stopped(answer, before=3), Stopped(answer, before=None)
    monkeypatch.setattr(bench, "_answer", first)
    assert main(command) == 130
    assert not (tmp_path / "bench.json").exists()
    assert "run the same command to go on" in capsys.readouterr().err
    monkeypatch.setattr(bench, "_answer", second)
    assert main(command) == 0
    assert (first.answered, second.answered) == (3, PROMPTS - 3)
    assert "goes on after 3 prompts" in capsys.readouterr().err
    assert load_bench(tmp_path / "bench.json").n_prompts == PROMPTS
    assert [path.name for path in tmp_path.glob("*.steps")] == []


def test_a_bench_whose_prompts_were_mended_keeps_the_others(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt is changed, one renamed, one left out, and they stand in another order."""
    answer = bench._answer
    monkeypatch.setattr(bench, "_answer", Stopped(answer, before=3))
    assert main(command) == 130
    first, *rest = tiny_prompts(PROMPTS)
    mended = [rest[1].model_copy(update={"turns": ["w9 w9"]}), first.model_copy(update={"id": "new", "task": "new"})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompt.model_dump_json() for prompt in [*mended, rest[2]]))
    capsys.readouterr()
    second = Stopped(answer, before=None)
    monkeypatch.setattr(bench, "_answer", second)
    assert main(command) == 0
    assert second.answered == 2
    assert "goes on after 1 prompts" in capsys.readouterr().err
    result = load_bench(tmp_path / "bench.json")
    assert (result.n_prompts, "new" in result.by_task) == (3, True)


def test_a_prompt_beyond_the_context_is_met_before_any_is_answered(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Stopped(bench._answer, before=None)
    monkeypatch.setattr(bench, "_answer", stopped)
    long = [Prompt(id=name, turns=[f"{name} " * 300]).model_dump_json() for name in ("one", "two")]
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write("\n".join(long))
    assert main(command[:-1]) == 1
    assert stopped.answered == 0
    error = capsys.readouterr().err
    assert "2 of 6 prompts cannot be answered" in error
    assert "prompt 'two' has 303 tokens" in error


def test_other_options_begin_a_bench_anew(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = bench._answer
    monkeypatch.setattr(bench, "_answer", Stopped(answer, before=2))
    assert main(command) == 130
    capsys.readouterr()
    anew = Stopped(answer, before=None)
    monkeypatch.setattr(bench, "_answer", anew)
    assert main([*command, "--seed", "7"]) == 0
    assert anew.answered == PROMPTS
    assert "goes on" not in capsys.readouterr().err


def test_what_does_not_go_on_promises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", stop)
    assert main(["generate"]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert main(["fit"]) == 130
    assert "--ckpt_path" in capsys.readouterr().err
