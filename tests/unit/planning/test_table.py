"""From predictions to the rows of a plan."""

from __future__ import annotations

import pytest

from tests.tiny import constant_gate
from viasd_calib.decoding.policies import Policy
from viasd_calib.errors import PlanningError
from viasd_calib.planning.break_even import drafting_pays_at, watched
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.planning.host import HostTime
from viasd_calib.planning.search import Predicted, Predictions
from viasd_calib.planning.table import base_of, best_group, plan_rows, rows_by_batch
from viasd_calib.profiling.profile import LatencyProfile, Measured, ProfileSettings
from viasd_calib.schema.plan import plan_problems
from viasd_calib.spec import Decoding, Gates

NOTHING, SPECULATIVE, LOOKUP = Policy("none", 0), Policy(None, 4, 0.4), Policy("lookup", 6)
TIERS, SLIM = Policy(None, 4, 0.2, 0.9, 0.7, 9), Policy("slim", 0, accept_at=0.5)
GATES = Gates(
    draft=constant_gate("draft_margin", 0.0), slim=constant_gate("slim_margin", 0.0), accept_at=0.9, regenerate_at=0.9
)


def predictions(context: int, **seconds: float) -> Predictions:
    """Made-up seconds a token at one context."""
    policies = {"nothing": NOTHING, "speculative": SPECULATIVE, "lookup": LOOKUP, "tiers": TIERS, "slim": SLIM}
    every = [Predicted(policies[name], value, 1, 0, 0, 1, 0) for name, value in seconds.items()]
    return Predictions(ReplayCosts(context, 1.0, [1.0], [1.0]), every)


KINDS = ("no drafting", "speculative", "lookup alone", "three tiers", "three tiers without a draft model")


def test_a_plan_has_one_drafter() -> None:
    """Lookup is the fastest at one context, the draft model at the other, by more: the latter drafts at both."""
    found = [
        predictions(100, nothing=5.0, speculative=3.0, lookup=2.5),
        predictions(400, nothing=5.0, speculative=2.0, lookup=4.0),
    ]
    assert [one.policy for one in best_group(found, [KINDS] * len(found))] == [SPECULATIVE, SPECULATIVE]
    found[0] = predictions(100, nothing=5.0, speculative=3.0, lookup=0.5)
    assert [one.policy for one in best_group(found, [KINDS] * len(found))] == [LOOKUP, LOOKUP]


def test_what_drafts_nothing_goes_with_either() -> None:
    found = [
        predictions(100, nothing=5.0, speculative=3.0, slim=2.5, lookup=9.0),
        predictions(400, nothing=1.0, speculative=2.0, slim=4.0, lookup=9.0),
        predictions(900, nothing=5.0, speculative=2.0, slim=4.0, lookup=9.0),
    ]
    chosen = [one.policy for one in best_group(found, [KINDS] * len(found))]
    assert chosen == [SLIM, NOTHING, SPECULATIVE]
    rows = plan_rows([100, 400, 900], chosen)
    assert [row.max_context for row in rows] == [200, 600, None]
    gates, decoding = base_of(rows, GATES, Decoding())
    assert (decoding.drafter, decoding.draft_length, gates.draft_stop_below) == (None, 4, 0.4)
    assert list(plan_problems(rows, gates, decoding)) == []


def test_policies_of_a_plan_know_when_drafting_pays() -> None:
    """At twice the cost of a pass a draft step is half as dear; one policy keeps one bound over its contexts."""
    costs = [ReplayCosts(100, 0.2, [1.0] * 7, [0.5] * 7), ReplayCosts(400, 0.2, [2.0] * 7, [0.5] * 7)]
    bounds = [one.drafting_pays_at for one in watched([SPECULATIVE, SPECULATIVE], costs)]
    assert bounds == [0.1, 0.1]
    found = watched([TIERS, NOTHING], costs)
    assert [one.drafting_pays_at for one in found] == [0.4, 0.0]
    assert watched([SPECULATIVE, LOOKUP], costs)[1].drafting_pays_at == 0.01
    assert found[0].planned().drafting_pays_at == 0.4
    assert found[1].planned().drafting_pays_at is None


def test_where_drafting_never_pays_by_its_costs_it_is_not_watched() -> None:
    """Decoding has shown otherwise, so that the account is too rough."""
    assert drafting_pays_at(SPECULATIVE, ReplayCosts(100, 3.0, [1.0] * 7, [0.5] * 7)) == 0


@pytest.mark.parametrize("only", [NOTHING, SLIM])
def test_where_nothing_is_ever_drafted_the_spec_says_so(only: Policy) -> None:
    rows = plan_rows([100], [only])
    gates, decoding = base_of(rows, GATES, Decoding())
    assert decoding.drafter == only.drafter
    assert gates.slim_tier == only.slim_tier
    assert list(plan_problems(rows, gates, decoding)) == []


def test_kinds_that_are_ruled_out_are_not_planned() -> None:
    found = [predictions(100, nothing=5.0, speculative=3.0, tiers=1.0, slim=2.0)]
    assert best_group(found, [KINDS] * len(found))[0].policy == TIERS
    assert best_group(found, [("no drafting", "speculative")])[0].policy == SPECULATIVE
    assert best_group(found, [("no drafting",)])[0].policy == NOTHING


def test_what_is_ruled_out_at_one_batch_may_be_planned_at_another() -> None:
    found = [predictions(100, nothing=5.0, speculative=3.0, tiers=1.0)] * 2
    chosen = best_group(found, [KINDS, ("no drafting", "speculative")])
    assert [one.policy for one in chosen] == [TIERS, SPECULATIVE]


def test_rows_of_batches() -> None:
    """Drafting is off beyond a batch; sizes whose rows are the same share them, half way by ratio to the next."""
    drafted, nothing = plan_rows([100, 400], [SPECULATIVE, TIERS]), plan_rows([100, 400], [NOTHING, NOTHING])
    rows = rows_by_batch([1, 4, 16, 64], [drafted, drafted, nothing, nothing])
    assert [(row.max_batch, row.max_context) for row in rows] == [(8, 200), (8, None), (None, None)]
    assert rows[-1].policy == NOTHING.planned()
    gates, decoding = base_of(rows, GATES, Decoding())
    assert list(plan_problems(rows, gates, decoding)) == []
    assert [(row.max_batch, row.max_context) for row in rows_by_batch([2], [drafted])] == [(None, 200), (None, None)]


def test_a_text_of_a_batch_has_its_share_of_the_passes() -> None:
    """Made-up costs: a pass of 4 texts takes 1.6 of one of a single text, a draft step of 4 takes 0.12."""
    settings = ProfileSettings(widths=(1, 2), contexts=(100,), batches=(1, 4), repeats=2)
    measured = []
    for shape in settings.shapes():
        seconds = (1.6 if shape.batch == 4 else 1.0) * shape.width * (0.5 if shape.tier == "slim" else 1.0)
        measured.append(Measured(**shape._asdict(), seconds=seconds, low=seconds, high=seconds))
    profile = LatencyProfile.model_construct(settings=settings, measured=tuple(measured))
    costs = ReplayCosts.of_profile(profile, 100, 2, 4, draft_step=0.12)
    assert costs.full == pytest.approx([0.4, 0.8])
    assert costs.slim == pytest.approx([0.2, 0.4])
    assert (costs.draft_step, costs.batch) == (pytest.approx(0.03), 4)
    assert HostTime(0.1, 0.01, 0.0, 0.2, 0.0).added_to(costs).round == 0.1, "the host's work is for each text"
    with pytest.raises(PlanningError, match="full was measured from batch 1 to 4, not at batch 16"):
        ReplayCosts.of_profile(profile, 100, 2, 16, draft_step=0.12)


def test_a_row_is_the_policy() -> None:
    gates, decoding = TIERS.planned().applied_to(GATES, Decoding())
    assert (gates.accept_at, gates.regenerate_at, gates.draft_accept_at, gates.draft_stop_below) == (0.7, 0.7, 0.9, 0.2)
    assert (decoding.draft_length, decoding.max_pending, decoding.drafter) == (4, 9, None)
    assert (gates.draft, gates.slim) == (GATES.draft, GATES.slim)


@pytest.mark.parametrize("contexts", [[], [200, 100], [100, 100]])
def test_contexts_rise(contexts: list[int]) -> None:
    with pytest.raises(PlanningError, match="in rising order"):
        plan_rows(contexts, [NOTHING] * len(contexts))
