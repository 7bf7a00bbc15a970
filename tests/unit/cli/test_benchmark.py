"""What ``viasd bench`` times is what it prints and writes, and what ``viasd report`` shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TinyFolder, tiny_prompts, tiny_spec
from viasd_calib.calibration.paired import FEWEST_PROMPTS
from viasd_calib.cli import main
from viasd_calib.decoding import conversation
from viasd_calib.decoding.conversation import Turn, converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.digest import policy_digest
from viasd_calib.evaluation import bench
from viasd_calib.evaluation.bench import BenchResult, load_bench
from viasd_calib.evaluation.method_columns import ratio
from viasd_calib.spec import load_spec

SECONDS = {"autoregressive": 12.0, "speculative": 6.0, "three_tier": 2.0}
"""That a method takes for a prompt, on the clock of these tests."""
TOKENS = 6


class Clock:
    """Stands still, but for what decoding a prompt is said to take."""

    now = 0.0

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def converse(self, decoder: Any, *arguments: Any) -> Iterator[Turn]:
        """The answers of a decoder, that take as long as its method's do."""
        assert isinstance(decoder, Decoder)
        self.now += SECONDS[decoder.strategy.name]
        return converse(decoder, *arguments)


@pytest.fixture
def measured(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[BenchResult, str]:
    """A benchmark of two tasks, as it was written and as it was printed."""
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(conversation, "converse", clock.converse)
    monkeypatch.setenv("COLUMNS", "200")
    spec, prompts = tiny_spec(tiny_folder, tmp_path), tmp_path / "prompts.jsonl"
    prompts.write_text("".join(prompt.model_dump_json() + "\n" for prompt in tiny_prompts(FEWEST_PROMPTS)))
    words = ["bench", "--spec", str(spec), "--prompts", str(prompts), "--json", str(tmp_path / "bench.json")]
    assert main([*words, "--max-new-tokens", str(TOKENS), "--audit", "strict", "--debug"]) == 0
    return load_bench(tmp_path / "bench.json"), capsys.readouterr().out.replace("\xa0", " ")


def cells(printed: str, heading: str) -> list[list[str]]:
    """The cells of a row of every printed table."""
    return [re.split(r"\s{2,}", line.strip())[1:] for line in printed.splitlines() if line.strip().startswith(heading)]


def test_a_speedup_is_the_baselines_time_over_the_methods_own(measured: tuple[BenchResult, str]) -> None:
    """The texts are equal, audit strict: so the speeds are as the times are, and so is every resample."""
    result, _ = measured
    wanted = {"autoregressive": (1.0, 0.5), "speculative": (2.0, 1.0), "three_tier": (6.0, 3.0)}
    pooled = [result.methods, *(task.methods for task in result.by_task.values())]
    assert len(pooled) == 3
    for methods in pooled:
        for name, row in methods.items():
            n_prompts = row.seconds / SECONDS[name]
            assert row.tokens_per_second == pytest.approx(row.tokens / (n_prompts * SECONDS[name]))
            for interval, wanted_ratio in zip(
                (row.speedup_vs_autoregressive, row.speedup_vs_speculative), wanted[name], strict=True
            ):
                assert interval is not None
                assert (interval.median, interval.n) == (pytest.approx(wanted_ratio), n_prompts)
                assert interval.bounds is None or interval.bounds == pytest.approx((wanted_ratio, wanted_ratio))
    assert result.methods["three_tier"].speedup_vs_autoregressive.bounds is not None  # type: ignore[union-attr]


def test_every_table_has_the_speedups_under_their_method(measured: tuple[BenchResult, str], tmp_path: Path) -> None:
    result, printed = measured
    over_autoregressive, over_speculative = cells(printed, "x autoregressive"), cells(printed, "x speculative")
    assert over_autoregressive[0] == ["1.00× [1.00, 1.00]", "2.00× [2.00, 2.00]", "6.00× [6.00, 6.00]"]
    assert over_speculative[0] == ["0.50× [0.50, 0.50]", "1.00× [1.00, 1.00]", "3.00× [3.00, 3.00]"]
    assert over_autoregressive[1:] == [["1.00× [–]", "2.00× [–]", "6.00× [–]"]] * 2  # a task has too few prompts
    speeds = [f"{row.tokens_per_second:.1f}" for row in result.methods.values()]
    assert cells(printed, "tokens/s")[0] == speeds
    assert f"{FEWEST_PROMPTS} prompts, {TOKENS} new tokens, float32" in printed
    assert printed.count(f"an interval takes {FEWEST_PROMPTS} at least") == 2
    assert printed.endswith(f"wrote {tmp_path / 'bench.json'}\n")


def test_the_file_says_what_was_measured(measured: tuple[BenchResult, str], tmp_path: Path) -> None:
    result, _ = measured
    assert result.settings.model_dump() == {
        "methods": [*SECONDS], "max_new_tokens": TOKENS, "dtype": "float32", "audit": "strict", "seed": 0,
        "backend": "eager", "offload": None, "drafting_pays_at": None,
    }  # fmt: skip
    assert result.provenance is not None
    assert result.provenance.policy_sha256 == policy_digest(load_spec(tmp_path / "routing.json"))
    assert {name: task.n_prompts for name, task in result.by_task.items()} == {
        task: sum(prompt.task == task for prompt in tiny_prompts(FEWEST_PROMPTS)) for task in ("coding", "qa")
    }


def test_a_report_shows_the_benchmark(
    measured: tuple[BenchResult, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = measured
    out = tmp_path / "pages" / "report.html"
    words = ["report", "--spec", str(tmp_path / "routing.json"), "--bench", str(tmp_path / "bench.json")]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "4", "--split", "null", "--limit", "1"]
    assert main([*words, "--out", str(out), "--debug"]) == 0
    assert capsys.readouterr().out.endswith(f"\nwrote {out}\n")
    assert [*out.parent.iterdir()] == [out]
    page = out.read_text(encoding="utf-8").replace("\xa0", " ")
    speed = result.methods["three_tier"].tokens_per_second
    decoding = result.methods["three_tier"].decode_speedup_vs_speculative
    shown = f"{ratio(decoding)}</td><td>100 %</td>".replace("\xa0", " ")
    row = f"three-tier</th><td>{speed:.1f}</td><td>6.00× [6.00, 6.00]</td><td>3.00× [3.00, 3.00]</td><td>{shown}"
    assert decoding is not None
    assert page.count(row) == 1
    assert "<strong>6.00×</strong> the speed of autoregressive decoding" in page
    assert "<strong>3.00×</strong> the speed of speculative decoding" in page
