"""Which policy is predicted to be the fastest, and the words for why."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.made_up_traces import made_up_table
from tests.tiny import tiny_profile
from viasd_calib.decoding.policies import Policy, PolicyKind
from viasd_calib.errors import PlanningError
from viasd_calib.planning.costs import ReplayCosts, simulated_seconds
from viasd_calib.planning.replay import replay
from viasd_calib.planning.search import PolicyGrid, Predictions, search
from viasd_calib.planning.traced import ReplayTable
from viasd_calib.planning.words import plan_words
from viasd_calib.profiling.profile import ProfileSettings
from viasd_calib.spec import PolicyDrafter

GRID = PolicyGrid(
    draft_lengths=(2, 4), stops=(0.0, 0.5), draft_bounds=(0.9, 1.01), thresholds=(0.5, 0.7), pending=(6, 12)
)


def costs(draft: float, slim: float, context: int = 128) -> ReplayCosts:
    """In full passes, which are the same at every width."""
    return ReplayCosts(context, draft, [1.0] * GRID.widest, [slim] * GRID.widest)


def searched(draft: float, slim: float, draft_right: float = 0.7, slim_right: float = 0.95) -> Predictions:
    return search(GRID, {None: made_up_table(draft_right, slim_right)}, [costs(draft, slim)])[0]


def test_a_slim_tier_is_taken_where_its_passes_are_cheap() -> None:
    found = searched(draft=0.02, slim=0.1)
    assert found.fastest.policy.kind == "three tiers"
    assert "The slim tier pays by the replay: a slim pass costs 0.10 of a full one" in " ".join(plan_words(found))


def test_no_slim_tier_where_its_passes_cost_what_full_ones_do() -> None:
    found = searched(draft=0.02, slim=1.0)
    assert found.fastest.policy.kind == "speculative"
    words = " ".join(plan_words(found))
    assert "No slim tier by the replay: a slim pass costs 1.00 of a full one" in words
    assert "which must be below 1;" in words


def test_no_drafting_where_the_drafter_is_never_right() -> None:
    found = searched(draft=0.2, slim=1.0, draft_right=0.0, slim_right=0.5)
    assert found.fastest.policy.kind == "no drafting"
    words = plan_words(found)
    assert words[0] == (
        "At context 128: no drafting, 1000.00 ms a token (simulated), 1.00 times the speed of no drafting."
    )
    assert words[1].startswith(
        "No drafting by the replay: a token takes 1.00 full passes that cost 1.00 of one over a single token"
    )


def test_no_draft_model_where_its_steps_cost_more_than_slim_passes() -> None:
    assert searched(draft=1.5, slim=0.1).fastest.policy.kind == "three tiers without a draft model"


def test_wide_passes_that_cost_more_make_blocks_shorter() -> None:
    """At costs in proportion to the width, drafting cannot pay; where they are flat it does."""
    texts: dict[PolicyDrafter | None, ReplayTable] = {None: made_up_table(0.8, None)}
    wide = ReplayCosts(128, 0.01, [float(width) for width in range(1, GRID.widest + 1)], [1.0])
    flat, proportional = search(GRID, texts, [costs(0.01, 1.0), wide])
    assert (flat.fastest.policy.kind, proportional.fastest.policy.kind) == ("speculative", "no drafting")


def test_lookup_alone_is_a_kind_of_its_own() -> None:
    found = search(GRID, {None: made_up_table(0.3, None), "lookup": made_up_table(0.8, None)}, [costs(0.3, 1.0)])[0]
    assert found.fastest.policy.kind == "lookup alone"
    assert set(found.by_kind) == {"no drafting", "speculative", "lookup alone"}


def test_the_fastest_of_a_kind_is_the_fastest_of_the_grid() -> None:
    table, priced = made_up_table(0.7, 0.9), costs(0.1, 0.4)
    found = search(GRID, {None: table}, [priced])[0]
    policies = GRID.policies([None, "slim"], slim_tier=True)
    alone = {policy: float(simulated_seconds(replay([policy], table), priced)) for policy in policies}
    assert len(alone) == 41
    assert found.fastest.seconds == pytest.approx(min(alone.values()))
    assert alone[found.fastest.policy] == pytest.approx(found.fastest.seconds)


def test_seconds_are_passes_times_what_they_cost() -> None:
    """The drafter is always right: of 60 tokens, 20 rounds of two drafted ones and one of q."""
    found = replay([Policy(None, 2)], made_up_table(1.0, None, texts=1))
    priced = ReplayCosts(128, 0.25, [10.0, 20.0, 30.0], [], round=5.0)
    assert simulated_seconds(found, priced).tolist() == [(20 * 30.0 + 40 * 0.25 + 20 * 5.0) / 60]


def test_prompts_are_charged_to_the_tokens_of_their_answers() -> None:
    """The verifier reads each prompt, and the draft model those whose answers it drafts."""
    found = replay([Policy(None, 2), Policy("none", 0)], made_up_table(1.0, None, texts=1))
    without = simulated_seconds(found, ReplayCosts(128, 0.25, [10.0, 20.0, 30.0], []))
    priced = simulated_seconds(found, ReplayCosts(128, 0.25, [10.0, 20.0, 30.0], [], prompt=3.0, draft_prompt=2.0))
    assert (priced - without).tolist() == pytest.approx([5.0, 3.0])


def test_several_of_a_kind_differ_in_what_a_replay_knows_least() -> None:
    """In the score at which q' decides, and without it in the stop bound; the others are the fastest alone."""
    table, priced = made_up_table(0.7, 0.9), costs(0.1, 0.4)
    wanted: dict[PolicyKind, int] = {"three tiers": 3, "speculative": 2}
    found = search(GRID, {None: table, "lookup": made_up_table(0.3, 0.9)}, [priced], wanted)[0].every
    kinds = [(one.policy.kind, one.policy.drafter) for one in found]
    assert Counter(kinds) == {
        ("no drafting", "none"): 1, ("speculative", None): 2, ("lookup alone", "lookup"): 1, ("three tiers", None): 2,
        ("three tiers without a draft model", "slim"): 1, ("three tiers without a draft model", "lookup"): 1,
    }  # fmt: skip
    tiers = [one for one in found if one.policy.kind == "three tiers"]
    assert {one.policy.accept_at for one in tiers} == {0.5, 0.7}, "the grid has no third threshold"
    assert {one.policy.stop_below for one in found if one.policy.kind == "speculative"} == {0.0, 0.5}
    policies = GRID.policies([None], slim_tier=True)
    for one in tiers:
        alike = [policy for policy in policies if policy.accept_at == one.policy.accept_at]
        assert one.seconds == pytest.approx(float(simulated_seconds(replay(alike, table), priced).min()))


def test_passes_wider_than_measured_are_refused() -> None:
    found = replay([Policy(None, 2)], made_up_table(1.0, None, texts=1))
    with pytest.raises(PlanningError, match="a full pass is 3 tokens wide, and 2 is the widest that was measured"):
        simulated_seconds(found, ReplayCosts(128, 0.25, [10.0, 20.0], []))


def test_costs_come_from_a_profile_at_a_context() -> None:
    settings = ProfileSettings(widths=(1, 4), contexts=(100, 200), batches=(1,), repeats=2)
    profile = tiny_profile(settings, lambda shape: shape.width + (shape.context or 0) / 100)
    found = ReplayCosts.of_profile(profile, 150, 3)
    assert found.full == pytest.approx([2.5, 3.5, 4.5])
    assert found.draft_step == pytest.approx(2.5)
    with pytest.raises(PlanningError, match="from context 100 to 200, not at context 300"):
        ReplayCosts.of_profile(profile, 300, 3)
