"""The comparison and its command, on a tiny verifier's traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.tiny import save_tiny
from tests.tiny.bits import priced
from viasd_calib.choices import LowBitMethod
from viasd_calib.cli import main
from viasd_calib.errors import CalibrationError, JobWarning, TraceError, ViasdError
from viasd_calib.pipeline.options import SearchOptions
from viasd_calib.pipeline.search import search
from viasd_calib.prompts import SplitShares
from viasd_calib.slim.parts import low_bit
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.search.compare import divide_texts
from viasd_calib.training.search.methods import CHOICES
from viasd_calib.training.search.record import SearchResult, load_search

SHARES = SplitShares(fit=1.0, calibrate=0.0, test=0.0)


def run(traces: Path, out: Path, methods: str = "even", **changes: Any) -> SearchResult:
    given = {"target_cost": 0.8, "shares": SHARES, "validation_share": 0.3, "methods": methods, **changes}
    return search(SearchOptions(traces=str(traces), json=str(out), **given))


ALL = ["--shares", '{"fit": 1.0, "calibrate": 0.0, "test": 0.0}', "--validation_share", "0.3"]


def read(traces: Path, validation_share: float = 0.3) -> TraceDataModule:
    data = TraceDataModule([str(traces)], shares=SHARES, validation_share=validation_share)
    data.setup()
    return data


@pytest.mark.parametrize("share", [0.3, 0.0])
def test_no_prompt_is_on_two_sides(traces: Path, share: float) -> None:
    texts = divide_texts(read(traces, share))
    evaluation, bridges, held_back = (
        {text.index for text in part} for part in (texts.evaluation, texts.bridges, texts.held_back)
    )
    assert not evaluation & bridges
    assert not (evaluation | bridges) & held_back
    assert len(evaluation) == (len(evaluation) + len(bridges)) // 5
    assert held_back


def test_a_limit_is_of_both_sides(traces: Path) -> None:
    texts = divide_texts(read(traces), limit=5)
    assert (len(texts.evaluation), len(texts.bridges), len(texts.held_back)) == (1, 4, 5)


def test_too_few_texts_are_refused(traces: Path) -> None:
    with pytest.raises(TraceError, match="capture more prompts"):
        divide_texts(read(traces), limit=1)


def test_the_command_compares_every_method(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit, "product_seconds", priced)
    out = tmp_path / "search.json"
    words = ["--traces", str(traces), "--json", str(out), "--target-cost", "0.8", "--budget", "12"]
    assert main(["search", *words, *ALL, "--limit_texts", "10", "--debug"]) == 0
    result = load_search(out)
    assert [*result.found] == [*CHOICES]
    for method, found in result.found.items():
        low = method in get_args(LowBitMethod)
        assert low or found.expected_cost <= 0.8 + 1e-4
        assert found.passes <= 12
        assert [*found.agreement_confident] == ["0.5", "0.7", "0.9"]
        assert (found.relative_cost is None) == (found.route.low_bit is not None) == low
        assert found.relative_cost is None or found.relative_cost > 0
        assert found.decoding_cost is not None
        assert found.decoding_cost > 0
        assert found.passes == {"even": 0, "similarity": 1, "random": 12, "dimr": 12}.get(method, found.passes)
        assert {0, 3}.isdisjoint(found.route.attention_skip + found.route.mlp_skip)
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.split()}
    assert rows["bits_8"][6] == f"{result.found['bits_8'].decoding_cost:.2f}"
    assert result.found["bits_8"].agreement > result.found["even"].agreement
    assert rows["knapsack"][1] == f"{result.found['knapsack'].agreement:.4f}"
    assert f"wrote {out}" in printed.replace("\n", "")


def test_bits_that_cannot_be_chosen_are_left_out(traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing has kernels for low bits."""
    monkeypatch.setattr(low_bit, "product_seconds", lambda *asked: dict.fromkeys(priced(*asked), 1.0))
    with pytest.warns(JobWarning, match="bits_auto is left out: no choice of bits brings the cost"):
        result = run(traces, tmp_path / "search.json", "bits_auto,bits_8", budget=18)
    assert [*result.found] == ["bits_8"]


def test_what_was_found_is_kept_where_a_later_method_fails(traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "search.json"
    with pytest.raises(CalibrationError, match="leave the method out"):
        run(traces, out, "even,greedy", budget=3)
    assert [*load_search(out).found] == ["even"]


def test_a_search_that_was_stopped_goes_on_with_the_next_method(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "search.json"
    with pytest.raises(CalibrationError, match="leave the method out"):
        run(traces, out, "even,random,greedy", budget=3)
    stopped = load_search(out).found
    monkeypatch.setitem(CHOICES, "even", lambda *_: pytest.fail("searched again"))
    with pytest.warns(JobWarning, match="goes on after 3 steps"):  # the costs, and two methods
        result = run(traces, out, "even,random,similarity", budget=3)
    assert {method: result.found[method] for method in stopped} == stopped
    assert [*result.found] == ["even", "random", "similarity"]
    assert list(tmp_path.iterdir()) == [out]


def test_bridges_are_left_out_on_request(traces: Path, tmp_path: Path) -> None:
    with_bridges, without = (run(traces, tmp_path / "search.json", bridges=bridges) for bridges in (True, False))
    assert (with_bridges.bridge_texts > 0, without.bridge_texts) == (True, 0)
    assert with_bridges.found["even"].route == without.found["even"].route
    assert with_bridges.found["even"].kl != without.found["even"].kl


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "even,best"}, "no method 'best'; choose from span, random"),
        ({"target_cost": 1.5}, "target_cost is 1.5; give a number above 0 and at most 1"),
        ({"target_cost": 0.01}, "raise target_cost"),
        ({"budget": 0}, "budget is 0; give a whole number, at least 1"),
        ({"methods": "greedy", "budget": 3}, "raise budget to 4 or leave the method out"),
    ],
)
def test_what_cannot_be_searched_is_said(traces: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    out = tmp_path / "search.json"
    with pytest.raises(ViasdError, match=message):
        run(traces, out, **options)
    assert not out.exists()


def test_another_verifier_is_refused(traces: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", family="qwen2")
    with pytest.raises(TraceError, match="give the verifier they were captured on"):
        run(traces, tmp_path / "search.json", verifier=str(other))


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps({"found": {}}), encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"is damaged .verifier: Field required.; run viasd search again"):
        load_search(tmp_path / "search.json")
