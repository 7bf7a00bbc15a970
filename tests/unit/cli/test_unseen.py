"""A spec is measured on prompts it does not know, and certified on distinct ones that its fit does not know."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TinyFolder, constant_gate, tiny_spec, verifier_ref
from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.cli import main
from viasd_calib.errors import CalibrationError, JobWarning
from viasd_calib.evaluation.bench import load_bench
from viasd_calib.evaluation.provenance import PromptsMeasured
from viasd_calib.pipeline.calibrate import refuse_learned_from
from viasd_calib.pipeline.prompt_choice import Unseen, choose_unseen, notice_other_prompts
from viasd_calib.pipeline.shared_options import UnseenPrompts
from viasd_calib.prompt_copies import normalised_sha256, short_hashes
from viasd_calib.prompts import Prompt, Split, split_sha256
from viasd_calib.spec import PromptHashes, Route, RoutingSpec, load_spec, save_spec

PROMPTS = [Prompt(id=f"p/{n}", task="qa", turns=[f"w{n} w{n + 1}"]) for n in range(8)]


def write(path: Path, prompts: Sequence[Prompt]) -> str:
    path.write_text("".join(prompt.model_dump_json() + "\n" for prompt in prompts))
    return str(path)


def spec_knowing(folder: TinyFolder, place: Path, prompts: Sequence[Prompt] | None) -> str:
    """A spec that was fitted on some prompts; None for one that does not say."""
    path = tiny_spec(folder, place)
    known = None if prompts is None else PromptHashes(fit=short_hashes(normalised_sha256(prompt) for prompt in prompts))
    save_spec(load_spec(path).model_copy(update={"prompts": known}), path)
    return str(path)


def bench(spec: str, prompts: str, *options: str) -> list[str]:
    words = ["bench", "--spec", spec, "--prompts", prompts, "--json", str(Path(spec).parent / "bench.json")]
    return [*words, "--max_new_tokens", "2", "--methods", "autoregressive,three_tier", *options]


def test_bench_leaves_out_what_the_spec_was_fitted_on(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_knowing(tiny_folder, tmp_path, PROMPTS[:3])
    copies = [prompt.model_copy(update={"turns": [f" {prompt.turns[0].upper()} "]}) for prompt in PROMPTS]
    prompts = write(tmp_path / "prompts.jsonl", [*copies[:3], *PROMPTS[3:]])
    assert main(bench(spec, prompts)) == 0
    assert "notice: 8 prompts, 3 left out: the spec was fitted or calibrated on them" in capsys.readouterr().err
    measured = load_bench(tmp_path / "bench.json")
    assert (measured.n_prompts, measured.provenance is not None) == (5, True)
    assert measured.provenance.prompts.model_dump() == {  # type: ignore[union-attr]
        "file": "prompts.jsonl", "sha256": split_sha256(PROMPTS[3:]), "split": None, "limit": None,
        "left_out": 3, "fitted_included": False,
    }  # fmt: skip
    assert measured.provenance.command.startswith("viasd bench --spec")  # type: ignore[union-attr]
    interval = measured.methods["three_tier"].speedup_vs_autoregressive
    assert interval is not None
    assert (interval.low, interval.high, interval.n) == (None, None, 5), "no interval over five prompts"


def test_an_option_takes_them_in(tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, prompts = spec_knowing(tiny_folder, tmp_path, PROMPTS), write(tmp_path / "prompts.jsonl", PROMPTS)
    assert main(bench(spec, prompts)) == 1
    assert "fitted or calibrated on all 8 prompts; give others, or --include-fitted true" in capsys.readouterr().err
    assert main(bench(spec, prompts, "--include-fitted", "true")) == 0
    assert "8 prompts, 8 of which the spec was fitted or calibrated on" in capsys.readouterr().err
    measured = load_bench(tmp_path / "bench.json")
    assert measured.n_prompts == 8
    assert measured.provenance is not None
    assert measured.provenance.prompts.fitted_included


def test_a_spec_that_does_not_say_is_measured_with_a_notice(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, prompts = spec_knowing(tiny_folder, tmp_path, None), write(tmp_path / "prompts.jsonl", PROMPTS[:1])
    assert main(bench(spec, prompts)) == 0
    assert "notice: the spec does not say which prompts it was fitted on" in capsys.readouterr().err


def test_a_report_and_evidence_take_the_benchmark_of_this_spec_alone(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    spec, prompts = spec_knowing(tiny_folder, tmp_path, []), write(tmp_path / "prompts.jsonl", PROMPTS[:2])
    other = spec_knowing(tiny_folder, tmp_path / "other", [])
    save_spec(load_spec(other).model_copy(update={"route": Route(attention_skip=[2])}), other)
    assert main(bench(other, prompts)) == 0
    words = ["report", "--spec", spec, "--out", str(tmp_path / "report.html"), "--prompts", prompts, "--split", "null"]
    assert main([*words, "--bench", str(tmp_path / "other" / "bench.json")]) == 1
    assert "measured another policy" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def choose_noticed(options: UnseenPrompts, spec: RoutingSpec) -> Unseen:
    """The prompts, and a notice of those left out where there are any."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        unseen = choose_unseen(options, spec)
    told = [f"{one.category.__name__}: {one.message}" for one in shown]
    assert len(told) == (unseen.left_out > 0)
    assert all(f"JobWarning: 8 prompts, {unseen.left_out} left out: the spec was fitted" in one for one in told)
    return unseen


@pytest.mark.parametrize(
    ("measured_on", "measured_split", "split", "said"),
    [
        (PROMPTS, None, None, False),
        (PROMPTS, None, "fit", False),
        (PROMPTS, "fit", "fit", False),
        (PROMPTS, "fit", None, True),
        (PROMPTS[3:], None, None, True),
    ],
    ids=["the same", "a split of them", "the same split", "more than its split", "another file"],
)
@pytest.mark.parametrize("limit", [None, 2])
def test_a_report_says_where_its_benchmark_is_of_other_prompts(
    measured_on: list[Prompt], measured_split: Split | None, split: Split | None, said: bool, limit: int | None,
    tiny_folder: TinyFolder, tmp_path: Path,
) -> None:  # fmt: skip
    spec = load_spec(spec_knowing(tiny_folder, tmp_path, PROMPTS[:1]))
    other, source = write(tmp_path / "other.jsonl", measured_on), write(tmp_path / "prompts.jsonl", PROMPTS)
    benched = choose_noticed(UnseenPrompts(prompts=other, split=measured_split, limit=3), spec)
    measured = PromptsMeasured(
        file="other.jsonl", sha256=split_sha256(benched.prompts), split=measured_split, limit=3,
        left_out=benched.left_out, fitted_included=False,
    )  # fmt: skip
    unseen = choose_noticed(UnseenPrompts(prompts=source, split=split, limit=limit), spec)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        notice_other_prompts(unseen, measured, spec, None, ("bench.json", "prompts.jsonl"))
    told = [str(one.message) for one in shown]
    where = f"split {measured_split!r}" if measured_split else "all splits"
    assert told == ([
        f"the speeds are those of bench.json, measured on other.jsonl ({where}); the tier shares, the text and "
        f"the rounds are of other prompts, {len(unseen.prompts)} of prompts.jsonl"
    ] if said else [])  # fmt: skip


def fit(**changes: Any) -> FitArtifact:
    gate = constant_gate("draft_margin", 0.0)
    entries: dict[str, Any] = {
        "verifier": verifier_ref(), "draft": "prompt_lookup", "route": Route(), "draft_gate": gate, "slim_gate": gate,
        "reliability": {}, "agreement": 0.8, "fit_sha256": "f" * 64,
    }  # fmt: skip
    return FitArtifact(**{**entries, **changes})


def test_calibrate_refuses_what_the_fit_learned_from(recwarn: pytest.WarningsRecorder) -> None:
    learned = short_hashes(normalised_sha256(prompt) for prompt in PROMPTS[:2])
    refuse_learned_from(PROMPTS[2:], fit(prompts=learned))
    with pytest.raises(CalibrationError, match=r"learned from 1 of these 7 prompts \(the first is 'p/1'\)"):
        refuse_learned_from(PROMPTS[1:], fit(prompts=learned))
    assert not recwarn.list
    with pytest.warns(JobWarning, match="the fit does not list which prompts it learned from"):
        refuse_learned_from(PROMPTS, fit())


@pytest.mark.parametrize(
    ("texts", "distinct"), [(["w1 w2 w3"] * 200, 1), ([f"w{n % 4} w5{' ' * (n // 4)} w6" for n in range(200)], 4)]
)
def test_copies_certify_nothing(
    texts: list[str], distinct: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt under 200 ids is one prompt; it is said before anything is loaded."""
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "fit.json").write_text("{}")
    prompts = write(
        tmp_path / "prompts.jsonl", [Prompt(id=f"p/{n}", task="qa", turns=[text]) for n, text in enumerate(texts)]
    )
    words = ["calibrate", "--prompts", prompts, "--fit", str(tmp_path / "fit"), "--out", str(tmp_path / "out")]
    shares = json.dumps({"fit": 0.0, "calibrate": 1.0, "test": 0.0})
    assert main([*words, "--max_loss", "0.3", "--confidence", "0.9", "--shares", shares]) == 1
    told = capsys.readouterr()
    assert f"{200 - distinct} of 200 prompts are left out: copies" in told.err
    assert f"takes 9 calibrate prompts at least, even where none diverges, and there are {distinct}" in told.err
    assert f"prompts by split: fit 0, calibrate {distinct}, test 0" in told.out
    assert not (tmp_path / "out").exists()
