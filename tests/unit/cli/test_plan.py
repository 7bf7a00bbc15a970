"""``viasd plan``: replay, decode, write, say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from tests.tiny import TinyFolder, drafted_spec, tiny_spec, tiny_traces
from viasd_calib.cli import main
from viasd_calib.decoding.engine import load_engine
from viasd_calib.pipeline import plan as job
from viasd_calib.planning import search as planning_search
from viasd_calib.planning.search import PolicyGrid
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
