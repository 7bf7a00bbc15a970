from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import constant_gate, verifier_ref
from viasd_calib.calibration.artifacts import FitArtifact
from viasd_calib.errors import CalibrationError
from viasd_calib.evaluation.frontier import CONFIDENT_SHARES, Frontier, FrontierMember, check_comparable, load_frontier
from viasd_calib.evaluation.plots import frontier_picture
from viasd_calib.file_names import FRONTIER_FILE
from viasd_calib.files import write_json
from viasd_calib.spec import Route


def member(cost: float, agreement: float, target: float = 0.5) -> FrontierMember:
    return FrontierMember(
        folder=f"cost-{target}", target_cost=target, relative_cost={1: 0.9, 4: cost, 8: 0.9}, agreement=agreement,
        agreement_confident=dict.fromkeys(CONFIDENT_SHARES, min(1.0, agreement + 0.1)),
        attention_skip=[1], mlp_skip=[1, 2],
    )  # fmt: skip


def frontier_of(*members: FrontierMember) -> Frontier:
    return Frontier(dtype="float32", device="cpu", hardware={"device": "abacus", "cores": 1}, members=list(members))


def fitted(**changes: Any) -> FitArtifact:
    gate = constant_gate("draft_margin", 0.0)
    entries: dict[str, Any] = {
        "verifier": verifier_ref(), "draft": "prompt_lookup", "route": Route(), "draft_gate": gate, "slim_gate": gate,
        "reliability": {}, "agreement": 0.5, "fit_sha256": "0" * 64,
    }  # fmt: skip
    return FitArtifact(**{**entries, **changes})


def test_the_best_is_not_the_dearest_but_the_one_that_agrees_best_within_the_cost() -> None:
    found = frontier_of(member(0.3, 0.6), member(0.4, 0.8), member(0.5, 0.7), member(0.6, 0.9))
    assert found.best(0.55) == member(0.4, 0.8)
    assert found.best(0.6) == member(0.6, 0.9)
    assert found.best(0.3) == member(0.3, 0.6)


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0.1, 1))
def test_the_best_costs_no_more_and_none_that_does_is_better(points: list[tuple[float, float]], cost: float) -> None:
    found = frontier_of(*(member(*point) for point in points))
    within = [point for point in points if point[0] <= cost]
    if not within:
        with pytest.raises(CalibrationError, match="no member of the frontier"):
            found.best(cost)
        return
    best = found.best(cost)
    assert best.cost <= cost
    assert best.agreement == max(agreement for _, agreement in within)
    assert best.cost == min(cost for cost, agreement in within if agreement == best.agreement)


def test_no_member_within_the_cost_names_the_cheapest() -> None:
    found = frontier_of(member(0.61, 0.9, 0.6), member(0.42, 0.8, 0.4))
    with pytest.raises(CalibrationError, match=r"at most 0\.3 at width 4; the cheapest is cost-0\.4 at 0\.4200: raise"):
        found.best(0.3)


def test_a_written_frontier_is_read(tmp_path: Path) -> None:
    found = frontier_of(member(0.4, 0.8), member(0.6, 0.9))
    write_json(tmp_path / FRONTIER_FILE, found)
    assert load_frontier(tmp_path) == found
    with pytest.raises(CalibrationError, match="is missing; run viasd frontier first"):
        load_frontier(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("prompts", {"fit_sha256": "1" * 64}),
        ("verifiers", {"verifier": verifier_ref(config_sha256="c" * 64)}),
        ("draft models", {"draft": "other"}),
    ],
)
def test_members_that_cannot_be_compared_are_refused(what: str, changes: dict[str, Any]) -> None:
    check_comparable([fitted(), fitted(agreement=0.9)])
    with pytest.raises(CalibrationError, match=f"fitted with different {what}"):
        check_comparable([fitted(), fitted(**changes)])


def test_the_picture_shows_agreement_against_measured_cost() -> None:
    found = frontier_of(member(0.6, 0.9, 0.65), member(0.4, 0.8, 0.35))
    (axes,) = frontier_picture(found).axes
    drawn = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert drawn["all places"] == [pytest.approx([0.4, 80]), pytest.approx([0.6, 90])]
    assert drawn["most confident 50%"] == [pytest.approx([0.4, 90]), pytest.approx([0.6, 100])]
    assert {text.get_text() for text in axes.texts} == {"0.35", "0.65"}
    low = member(0.5, 0.95).model_copy(update={"folder": "low-bit-8", "target_cost": None, "low_bits": "all"})
    (axes,) = frontier_picture(frontier_of(*found.members, low)).axes
    drawn = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert drawn["all places"] == [pytest.approx([0.4, 80]), pytest.approx([0.6, 90])]
    assert [pytest.approx([0.5, 95])] in drawn.values()
    assert {text.get_text() for text in axes.texts} == {"0.35", "0.65", "8"}
    assert "hollow: low bits" in axes.get_xlabel()
