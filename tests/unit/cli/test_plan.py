"""``viasd plan``: replay, decode, write, say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny import TinyFolder, drafted_spec, tiny_spec, tiny_traces
from viasd_calib.calibration.paired import Interval
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.decoding.policies import Policy
from viasd_calib.pipeline import plan as job
from viasd_calib.planning import search as planning_search
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.search import PolicyGrid, Predicted, Predictions
from viasd_calib.spec import OffloadRef, load_spec, save_spec

GRID = PolicyGrid(draft_lengths=(2,), stops=(0.0,), draft_bounds=(1.01,), thresholds=(0.4,), pending=(6,))


@pytest.fixture
def place(tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec that drafts with a model, traces of its verifier, and a small grid."""
    drafted_spec(tiny_folder, tmp_path)
    tiny_traces(tiny_folder, tmp_path / "traces", 6, max_new_tokens=12)
    import_module("viasd_calib.pipeline.replayed")  # which else would keep the small grid for the tests after this one
    monkeypatch.setattr(planning_search, "PolicyGrid", lambda: GRID)
    monkeypatch.setattr(job, "WIDTHS", (1, 2, 4, 9))
    monkeypatch.setattr(job, "COST_REPEATS", 2)
    return tmp_path


def words_of(place: Path, *more: str) -> list[str]:
    return [
        "plan", "--spec", str(place / "routing.json"), "--traces", str(place / "traces"),
        "--out", str(place / "planned.json"), "--contexts", "[16,48]", "--max-new-tokens", "8", *more,
    ]  # fmt: skip


def test_a_plan_is_made_written_and_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On five prompts nothing shows that the slim tier pays; the text is that of the verifier."""
    assert main(words_of(place, "--limit", "5", "--debug")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    spec = load_spec(place / "planned.json")
    assert spec.plan is not None
    assert spec.plan[-1].max_context is None
    assert not any(row.policy.slim_tier for row in spec.plan)
    assert "No slim tier: decoded on 5 prompts it is not shown to be faster" in printed
    assert "(simulated)" in printed
    assert printed.count("speed of no drafting") == 2, "a sentence for each context"
    assert "full / slim / draft, a token" in printed
    assert "At context 16: " in printed
    assert "At context 48: " in printed
    engine = load_engine(place / "planned.json")
    found, wanted = (engine.decoder(name).generate([5, 6, 7], 20) for name in ("three_tier", "autoregressive"))
    assert found.tokens == wanted.tokens


def test_a_plan_by_batch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each batch size is replayed at its own costs and decoded by itself; the texts are the verifier's in a batch."""
    assert main(words_of(place, "--limit", "5", "--batches", "4,1", "--debug")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    spec = load_spec(place / "planned.json")
    assert spec.plan is not None
    assert (spec.plan[-1].max_batch, spec.plan[-1].max_context) == (None, None)
    assert {row.max_batch for row in spec.plan} <= {2, None}
    assert "No slim tier: decoded on 5 prompts it is not shown to be faster" in printed
    assert "No slim tier: decoded in batches of 4 texts (2 of them) it is not shown to be faster" in printed
    assert printed.count("speed of no drafting") == 4, "a sentence for each context and batch"
    assert "At context 48, 4 texts together: " in printed
    engine = load_engine(place / "planned.json")
    prompts = [[5, 6, 7], [8], [9, 9], [4, 4, 5, 4, 4]]
    found, wanted = (engine.decoder(name).generate_batch(prompts, 12) for name in ("three_tier", "autoregressive"))
    assert [one.tokens for one in found] == [one.tokens for one in wanted]


def test_rows_of_a_plan_follow_what_was_shown_at_each_batch() -> None:
    """Made up: alone the slim tier is faster; of four texts it is not, and drafting was slower when decoded."""
    costs = ReplayCosts(100, 0.1, [1.0] * 9, [0.2] * 9)
    nothing, drafted = Policy("none", 0), Policy(None, 4)
    tiers = Policy(None, 4, accept_at=0.5, max_pending=9)
    every = [Predicted(one, seconds, 1, 0, 0, 1, 0) for one, seconds in ((nothing, 3.0), (drafted, 2.0), (tiers, 1.0))]
    found = [Predictions(costs, every)]

    def shown(slim_speed: float, speculative: float) -> Any:
        interval = Interval(median=slim_speed, low=slim_speed, high=slim_speed, n=6)
        measured = {"no drafting": 3.0, "speculative": speculative, "three tiers": 1.0}
        return job._Decoded(SimpleNamespace(slim_speed=interval), measured)  # type: ignore[arg-type]

    rows, words = job._rows(
        [100], {1: found, 4: found, 16: found}, {1: shown(2.0, 2.0), 4: shown(0.9, 2.0), 16: shown(0.9, 4.0)}
    )
    assert [(row.max_batch, row.policy.slim_tier, row.policy.draft_length) for row in rows] == [
        (2, True, 4), (8, False, 4), (None, False, 0),
    ]  # fmt: skip
    assert "Decoded on 6 prompts, the slim tier is faster: 2.00 [2.00, 2.00] times." in words
    assert any(line.startswith("Left out in batches of 16: speculative took 4000.00 ms") for line in words)


@pytest.mark.usefixtures("empty_cache")
def test_a_plan_for_layers_that_are_read_says_so(place: Path) -> None:
    """Passes are timed with reading, and whoever loads the spec reads so; without --offload as the spec says."""
    bound = ["--offload", "disk", "--memory", "1MB", "--bandwidth", "1GB"]
    assert main(words_of(place, "--limit", "2", *bound)) == 0
    entry = OffloadRef(kind="disk", memory=10**6)
    spec = load_spec(place / "planned.json")
    assert spec.offload == entry
    assert spec.plan is not None
    save_spec(spec.model_copy(update={"plan": None}), place / "routing.json")
    assert main(words_of(place, "--limit", "2")) == 0
    assert load_spec(place / "planned.json").offload == entry
    assert main(words_of(place, "--limit", "2", "--offload", "none")) == 0
    assert load_spec(place / "planned.json").offload is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--contexts", "[]"], "--contexts is []"),
        (["--batches", "0"], "--batches is 0; give whole numbers, at least 1, as 1,4,16"),
        (["--batches", "1,64"], "--batches 64 takes as many prompts at least to be decoded, and there are"),
        (["--traces", "none"], "cannot read none"),
        (["--profile", "none.json"], "cannot read the latency profile none.json"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    place: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_of(place, *change)) == 1
    assert message in capsys.readouterr().err


def test_a_spec_stays_beside_its_tensors(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "other").mkdir()
    assert main(words_of(place, "--out", str(place / "other" / "planned.json"))) == 1
    assert "lies in another folder than" in capsys.readouterr().err


def test_a_spec_without_gates_is_refused(
    tiny_folder: TinyFolder, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_spec(tiny_folder, place)
    assert main(words_of(place)) == 1
    assert "has no draft gate or no calibrated slim gate" in capsys.readouterr().err


def test_sampled_texts_are_refused(tiny_folder: TinyFolder, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_traces(tiny_folder, place / "sampled", 4, max_new_tokens=4, temperature=1.0)
    assert main(words_of(place, "--traces", str(place / "sampled"))) == 1
    assert "holds texts that were sampled" in capsys.readouterr().err


def test_the_widest_pass_that_is_timed_is_the_grids() -> None:
    assert job.WIDTHS[-1] == PolicyGrid().widest
