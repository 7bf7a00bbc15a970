"""``viasd plan``: replay, decode, write, say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.timings import make_timing
from tests.tiny import TinyFolder, drafted_spec, tiny_spec, tiny_traces
from viasd_calib.calibration import policy_search
from viasd_calib.calibration.paired import Spent
from viasd_calib.cli import main
from viasd_calib.cli.plan import predictions_table
from viasd_calib.decoding.engine import load_engine
from viasd_calib.decoding.policies import Policy
from viasd_calib.pipeline import plan as job
from viasd_calib.pipeline import replayed
from viasd_calib.pipeline.options import PlanOptions
from viasd_calib.pipeline.plan_decoded import Decoded
from viasd_calib.planning import search as planning_search
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.search import PolicyGrid, Predicted, Predictions
from viasd_calib.prompts import Prompt, SplitShares
from viasd_calib.spec import OffloadRef, load_spec, save_spec

GRID = PolicyGrid(draft_lengths=(2,), stops=(0.0,), draft_bounds=(1.01,), thresholds=(0.4,), pending=(6,))


@pytest.fixture
def place(tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec that drafts with a model, traces of its verifier, and a small grid."""
    drafted_spec(tiny_folder, tmp_path)
    tiny_traces(tiny_folder, tmp_path / "traces", 6, max_new_tokens=12)
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
    assert re.search(r"No context has the 6 prompts that an interval takes \([05] at 16, [05] at 48\): 5 are", printed)
    assert "raise --limit to 6 at least." in printed
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


def predicted_at(context: int, draft_length: int = 4) -> Predictions:
    """Made up: three tiers are the fastest, then speculative decoding, then no drafting."""
    drafted = Policy(None, draft_length)
    tiers = replace(drafted, accept_at=0.4, max_pending=9)
    seconds = {Policy("none", 0): 3.0, drafted: 2.0, tiers: 1.0}
    costs = ReplayCosts(context, 0.1, [1.0] * 9, [0.2] * 9)
    return Predictions(costs, [Predicted(one, took, 1, 0, 0, 1, 0) for one, took in seconds.items()])


def test_rows_of_a_plan_follow_what_was_shown_at_each_batch() -> None:
    """Made up: alone the slim tier is faster; of four texts it is not, and drafting was slower when decoded."""
    found = [predicted_at(100)]

    def shown(slim_speed: float, speculative: float) -> dict[int, Decoded]:
        decision = make_timing(1.0, slim_speed, n_prompts=6).decision
        return {100: Decoded(decision, {"no drafting": 3.0, "speculative": speculative, "three tiers": 1.0})}

    rows, words = job._rows(
        [100], {1: found, 4: found, 16: found}, {1: shown(2.0, 2.0), 4: shown(0.9, 2.0), 16: shown(0.9, 4.0)}
    )
    assert [(row.max_batch, row.policy.slim_tier, row.policy.draft_length) for row in rows] == [
        (2, True, 4), (8, False, 4), (None, False, 0),
    ]  # fmt: skip
    assert "Decoded on 6 prompts, the slim tier is faster: 2.00 [2.00, 2.00] times." in words
    assert any(line.startswith("Left out in batches of 16: speculative took 4000.00 ms") for line in words)


def options_with(place: Path, short: int, long: int) -> PlanOptions:
    """Contexts of 16 and 48, and so many prompts of the calibrate split near to each; 6 are taken."""
    prompts = [
        Prompt(id=f"{count}/{number}", turns=[f"w{number}" + " w3" * count])
        for count, many in ((2, short), (40, long))
        for number in range(many)
    ]
    path = place / "prompts.jsonl"
    path.write_text("".join(prompt.model_dump_json() + "\n" for prompt in prompts))
    return PlanOptions(
        spec=str(place / "routing.json"), traces=str(place / "traces"), out=str(place / "planned.json"),
        contexts=[16, 48], max_new_tokens=8, limit=6, prompts=str(path),
        shares=SplitShares(fit=0.0, calibrate=1.0, test=0.0),
    )  # fmt: skip


def decoded_cells(result: job.PlanResult) -> list[tuple[str, bool]]:
    """Of each row of the table its context, and whether it shows what was decoded."""
    columns = {str(column.header): [*column.cells] for column in predictions_table(result).columns}
    return [(str(context), bool(cell)) for context, cell in zip(columns["context"], columns["decoded"], strict=True)]


def test_short_and_long_prompts_are_decoded_each_at_their_context(place: Path) -> None:
    """On the clock, so that either may be faster at either context; words say which context they speak of."""
    result = job.plan(options_with(place, short=7, long=6))
    assert {context: one.decision.slim_speed.n for context, one in result.decoded[1].items()} == {16: 6, 48: 6}
    said = [line for line in result.words if "on 6 prompts" in line]
    assert [re.findall("(No slim tier|Decoded) at context (.*?)[: ]", line)[0][1] for line in said] == ["16", "48"]
    assert not any("too few" in line or "No context" in line for line in result.words)
    assert {context for context, shown in decoded_cells(result) if shown} == {"16", "48"}
    engine = load_engine(place / "planned.json")
    for prompt in ([5, 6, 7], [5, 6, 7] * 16):
        found, wanted = (engine.decoder(name).generate(prompt, 20) for name in ("three_tier", "autoregressive"))
        assert found.tokens == wanted.tokens


def test_a_context_without_prompts_is_decided_as_at_the_nearest(place: Path) -> None:
    result = job.plan(options_with(place, short=6, long=5))
    assert [*result.decoded[1]] == [16]
    assert (
        "At context 48 too few prompts are as long (5 of the 6 that an interval takes): decided as at 16; give some of "
        "24 tokens or more with --prompts."
    ) in result.words
    assert not any(" at context 16" in line for line in result.words), "there is one that was decoded"
    assert {context for context, shown in decoded_cells(result) if shown} == {"16"}


class Clock:
    """In place of the clock: a token takes what is said of a kind of policy in short texts and in long ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, short: dict[str, float], long: dict[str, float]) -> None:
        self.short, self.long = short, long
        self.decoded: list[tuple[int, list[int]]] = []
        monkeypatch.setattr(policy_search, "decode_in_turns", self)

    def __call__(
        self, _: str, decoders: Sequence[Any], verifier: Any, prompts: Sequence[Prompt], *__: Any, **___: Any
    ) -> list[Spent]:
        (words,) = {len(prompt.turns[0].split()) for prompt in prompts}
        strategies = [decoder.strategy for decoder in decoders]
        self.decoded.append((words, [one.draft_length for one in strategies]))
        seconds = self.short if words == 3 else self.long
        kinds = ["tiers" if one.rule else "drafted" if one.draft_length else "nothing" for one in strategies]
        return [Spent([8] * len(prompts), [8 * seconds[kind]] * len(prompts)) for kind in kinds]


def test_what_is_slower_at_one_context_is_left_out_there_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the policies that are decoded at a context are those that are predicted there."""
    clock = Clock(
        monkeypatch,
        short={"tiers": 3.0, "drafted": 1.0, "nothing": 2.0},
        long={"tiers": 1.0, "drafted": 3.0, "nothing": 2.0},
    )
    predictions = [predicted_at(16, draft_length=3), predicted_at(48, draft_length=2)]
    monkeypatch.setattr(replayed, "predictions_at", lambda *_, **__: {1: predictions})
    result = job.plan(options_with(place, short=6, long=6))
    assert [(words, sorted(lengths)) for words, lengths in clock.decoded] == [(3, [0, 3, 3]), (41, [0, 2, 2])]
    assert result.spec.plan is not None
    assert [(row.max_context, row.policy.slim_tier, row.policy.draft_length) for row in result.spec.plan] == [
        (27, False, 3), (None, True, 2),
    ]  # fmt: skip
    ruled_out = [line for line in result.words if line.startswith(("No slim tier at", "Left out", "Decoded"))]
    assert [line.partition(" it ")[0].partition(" took ")[0].partition(" is ")[0] for line in ruled_out] == [
        "No slim tier at context 16: decoded on 6 prompts",
        "Decoded at context 48 on 6 prompts, the slim tier",
        "Left out at context 48: speculative",
    ]


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
