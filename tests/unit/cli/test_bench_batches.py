"""``viasd bench --batch``: the same prompts, several texts together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.offload_cases import save_verifier, write_spec
from tests.tiny import TinyFolder, tiny_prompts, tiny_spec
from viasd_calib.cli import main
from viasd_calib.decoding import conversation
from viasd_calib.decoding.conversation import Turn, converse, converse_together
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import load_engine
from viasd_calib.evaluation import bench
from viasd_calib.evaluation.bench import load_bench
from viasd_calib.prompts import Prompt
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.offload.stream import HostStream
from viasd_calib.spec import Route

PROMPTS = 14
SECONDS = {"autoregressive": 12.0, "speculative": 6.0, "three_tier": 2.0}
"""That a method takes for a prompt or a batch, on the clock of these tests."""


class Clock:
    """Stands still, but for what decoding takes; notes how many texts each method decoded together."""

    def __init__(self) -> None:
        self.now = 0.0
        self.decoded: list[tuple[str, int]] = []

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def converse(self, decoder: Any, verifier: Any, prompt: Prompt, count: int) -> Iterator[Turn]:
        """A prompt by itself."""
        self.spend(decoder, 1)
        return converse(decoder, verifier, prompt, count)

    def converse_together(self, decoder: Any, verifier: Any, prompts: Sequence[Prompt], count: int) -> list[list[Turn]]:
        """A batch."""
        self.spend(decoder, len(prompts))
        return converse_together(decoder, verifier, prompts, count)

    def spend(self, decoder: Any, texts: int) -> None:
        """Let the time of a method pass."""
        assert isinstance(decoder, Decoder)
        self.now += SECONDS[decoder.strategy.name]
        self.decoded.append((decoder.strategy.name, texts))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(conversation, "converse", clock.converse)
    monkeypatch.setattr(conversation, "converse_together", clock.converse_together)
    monkeypatch.setenv("COLUMNS", "200")
    return clock


@pytest.fixture
def command(tiny_folder: TinyFolder, tmp_path: Path) -> list[str]:
    spec, prompts = tiny_spec(tiny_folder, tmp_path / "spec"), tmp_path / "prompts.jsonl"
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(PROMPTS, turns=2)))
    words = ["bench", "--spec", str(spec), "--prompts", str(prompts), "--json", str(tmp_path / "bench.json")]
    return [*words, "--max-new-tokens", "5", "--audit", "strict", "--debug"]


def test_each_batch_size_is_compared_with_itself(
    command: list[str], clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """14 prompts are 7 batches of two, which have an interval, and 4 of four, which have none; texts stay equal."""
    assert main([*command, "--batch", "1,2,4"]) == 0
    result = load_bench(tmp_path / "bench.json")
    single = result.methods["autoregressive"]
    assert {size: found.texts for size, found in result.by_batch.items()} == {2: [2] * 7, 4: [4, 4, 4, 2]}
    for found in result.by_batch.values():
        assert list(found.methods) == [*SECONDS]
        assert found.peak_memory_bytes == {}
        for name, wanted in {"autoregressive": (1.0, 0.5), "speculative": (2.0, 1.0), "three_tier": (6.0, 3.0)}.items():
            row = found.methods[name]
            assert row.seconds == len(found.texts) * SECONDS[name]
            assert row.tokens == single.tokens
            assert row.tokens_per_second == pytest.approx(row.tokens / row.seconds)
            assert row.identical_to_autoregressive == 1
            assert row.full_passes_per_token == pytest.approx(result.methods[name].full_passes_per_token)
            speedups = (row.speedup_vs_autoregressive, row.speedup_vs_speculative)
            for interval, ratio in zip(speedups, wanted, strict=True):
                assert interval is not None
                assert (interval.median, interval.n) == (pytest.approx(ratio), len(found.texts))
                assert (interval.bounds is None) == (len(found.texts) < 6)
    # Methods take turns batch by batch, each on the batches that the others have; a warm-up goes before each size.
    of_four = [texts for name, texts in clock.decoded[-3 * 4 :]]
    assert of_four == [4] * 9 + [2] * 3
    turns = [clock.decoded[begin : begin + 3] for begin in range(0, len(clock.decoded), 3)]
    assert all({name for name, _ in one} == {*SECONDS} for one in turns)
    printed = capsys.readouterr().out.replace("\xa0", " ")
    groups = re.findall(r"^ ?batch (\d+) *$", printed, re.MULTILINE)
    assert groups == ["1", "2", "4"]
    assert printed.count("x autoregressive") == 3 + 2  # and in the tables of two tasks
    assert "batch 2: 14 prompts in 7 batches; batch 4: 14 prompts in 4 batches" in " ".join(printed.split())
    assert "none for batch 4" in " ".join(printed.split())


def test_one_text_at_a_time_is_written_as_before(command: list[str], clock: Clock, tmp_path: Path) -> None:
    document = []
    for asked in ([], ["--batch", "1"]):
        assert main([*command, *asked]) == 0
        document.append(json.loads((tmp_path / "bench.json").read_text()))
    plain, asked_for = document
    assert plain.keys() == {
        "provenance", "hardware", "settings", "n_prompts", "methods", "offload", "by_task", "by_context",
    }  # fmt: skip
    assert asked_for["settings"] == plain["settings"]
    assert asked_for["methods"]["three_tier"].keys() == plain["methods"]["three_tier"].keys()
    assert asked_for["methods"]["three_tier"]["tokens"] == plain["methods"]["three_tier"]["tokens"]
    assert {texts for _, texts in clock.decoded} == {1}


def test_batches_alone(command: list[str], clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No text is decoded alone, so that there is neither evidence nor a report."""
    assert main([*command, "--batch", "2", "--methods", "three_tier"]) == 0
    result = load_bench(tmp_path / "bench.json")
    assert (result.methods, result.by_task, list(result.by_batch)) == ({}, {}, [2])
    assert result.by_batch[2].methods["three_tier"].identical_to_autoregressive == 1
    assert {texts for _, texts in clock.decoded} == {2}
    words = ["report", "--spec", str(tmp_path / "spec" / "routing.json"), "--bench", str(tmp_path / "bench.json")]
    capsys.readouterr()
    assert main([*words, "--prompts", command[4], "--out", str(tmp_path / "r.html")]) == 1
    assert "measured batches alone; run viasd bench with --batch 1 among its batches" in capsys.readouterr().err


def test_a_report_shows_batches(command: list[str], clock: Clock, tmp_path: Path) -> None:
    assert main([*command, "--batch", "1,4"]) == 0
    words = ["report", "--spec", str(tmp_path / "spec" / "routing.json"), "--bench", str(tmp_path / "bench.json")]
    words += ["--prompts", command[4], "--max-new-tokens", "4", "--limit", "1", "--split", "null"]
    assert main([*words, "--out", str(tmp_path / "r.html"), "--debug"]) == 0
    assert "batch 4, 14 prompts in 4 batches" in (tmp_path / "r.html").read_text(encoding="utf-8")


class Stopped:
    """Counts the batches that are decoded, and is interrupted before one of them."""

    def __init__(self, answer: Callable[..., Any], before: int | None) -> None:
        self.answer = answer
        self.before = before
        self.answered: list[int] = []

    def __call__(self, *arguments: Any) -> Any:
        if len(self.answered) == self.before:
            raise KeyboardInterrupt
        self.answered.append(len(arguments[2]))
        return self.answer(*arguments)


def test_a_bench_that_was_stopped_goes_on_after_its_batches(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = bench._answer
    first, second = Stopped(answer, before=PROMPTS + 2), Stopped(answer, before=None)
    monkeypatch.setattr(bench, "_answer", first)
    assert main([*command, "--batch", "1,4"]) == 130
    monkeypatch.setattr(bench, "_answer", second)
    assert main([*command, "--batch", "1,4"]) == 0
    assert (first.answered, second.answered) == ([1] * PROMPTS + [4, 4], [4, 2])
    assert f"goes on after {PROMPTS + 2} prompts and batches" in capsys.readouterr().err
    assert load_bench(tmp_path / "bench.json").by_batch[4].texts == [4, 4, 4, 2]


def test_batches_with_layers_that_are_read_for_each_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verifier = save_verifier(tmp_path / "verifier")
    spec = write_spec(verifier, Route(attention_skip=[1], mlp_skip=[2]))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(4)))
    words = ["bench", "--spec", str(spec), "--prompts", str(prompts), "--json", str(tmp_path / "bench.json")]
    words += ["--max-new-tokens", "5", "--methods", "autoregressive,three_tier", "--offload", "disk", "--batch", "4"]
    assert main([*words, "--debug"]) == 0
    result = load_bench(tmp_path / "bench.json")
    assert result.offload is not None
    assert result.offload.peak_memory_bytes == {}
    assert result.by_batch[4].methods["three_tier"].identical_to_autoregressive == 1
    peaks = result.by_batch[4].peak_memory_bytes
    assert peaks.keys() <= {"autoregressive", "three_tier"}
    assert ("peak of memory in batches of 4" in capsys.readouterr().out) == bool(peaks)


def test_a_batch_reads_layers_once_for_all_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the prompts, and then as often as the longest text takes passes, not as all of its texts do."""
    verifier = save_verifier(tmp_path / "verifier")
    spec = write_spec(verifier, Route(attention_skip=[1], mlp_skip=[2]))
    engine = load_engine(spec, offload=Offload("disk"), backend="eager")
    taken: list[int] = []
    take = HostStream.take
    monkeypatch.setattr(HostStream, "take", lambda stream, one: (taken.append(one), take(stream, one))[1])
    texts = engine.decoder("autoregressive").generate_batch([[5, 6, 7], [8, 9], [9, 9, 9, 9]], 6)
    passes = [text.counts.full_passes for text in texts]
    assert taken.count(0) == 1 + max(passes) < sum(passes)
