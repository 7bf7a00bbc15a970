"""A replay counts as the decoder does: exactly where it can know, else within what is stated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import Case, cases, lively_case
from tests.tiny import DRAFTERS
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.policies import Policy
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.planning.places import drafted_places, proposals_of, slim_places
from viasd_calib.planning.replay import ReplayCounts, replay
from viasd_calib.planning.traced import ReplayTable, ReplayText
from viasd_calib.replay.agreement import text_cache
from viasd_calib.replay.teacher import read_text
from viasd_calib.spec import LogisticGate, Route
from viasd_calib.traces.texts import TraceText

TRUE_DRAFTERS = [name for name in DRAFTERS if name != "random"]
"""Those whose proposal follows from the text."""
SAME_CHOICE = LogisticGate(
    features=["log_ratio", "slim_margin"], mean=[0.0, 0.0], scale=[1.0, 1.0], weight=[1e4, 4.0], bias=-1.0
)
"""A slim gate that trusts no token but q's slim choice, and this one by its margin."""


def traced(case: Case) -> TraceText:
    """The text that q writes, as a capture records it."""
    written = case.expected
    ids = torch.tensor([*case.prompt, *written])
    states, _ = read_text(case.verifier, ids[None, :-1])
    logits = case.verifier.logits(states.last)[0, len(case.prompt) - 1 :]
    nothing = torch.empty(0)
    return TraceText(
        index=0, prompt_id="0", prompt_sha256="0" * 64, task="qa", turn=0, ids=ids, prompt_length=len(case.prompt),
        q_ids=logits.topk(4).indices, q_log_probs=logits.log_softmax(-1).topk(4).values.float(),
        p_token=nothing, p_depth=nothing, p_top_k=None, p_entropy=nothing, p_margin=nothing,
    )  # fmt: skip


def table_of(several: Sequence[Case], depths: int = 8, ages: int = 22) -> ReplayTable:
    """What a replay reads of the texts of cases, every age measured."""
    found = []
    for case in several:
        text, model, drafter = traced(case), case.verifier, case.drafter
        tapped = read_text(model, text.ids[None, :-1], drafter.taps)[0].tapped[0]
        proposals = proposals_of(drafter, text, tapped, depths)
        draft = None if case.gates.draft is None else Gate(case.gates.draft)
        slim = None
        if case.gates.slim is not None:
            (slim,) = slim_places(
                model, Gate(case.gates.slim), text, text_cache(model, text), [proposals.by_depth], ages, ages
            )
        found.append(ReplayText(case.count, drafted_places(proposals, draft, text), slim))
    return ReplayTable.of(found)


def spent(found: ReplayCounts) -> tuple[int, int, int]:
    return int(found.full.sum()), int(found.slim.sum()), int(found.draft_steps.sum())


def counts_of(generations: Sequence[Generation]) -> tuple[int, int, int]:
    every = [one.counts for one in generations]
    return (
        sum(one.full_passes for one in every),
        sum(one.slim_passes for one in every),
        sum(one.draft_steps for one in every),
    )


@settings(max_examples=12)
@given(case=cases(drafter_kind=st.sampled_from(TRUE_DRAFTERS)))
def test_speculative_counts_are_the_decoders(case: Case) -> None:
    """Any family, drafter, end of text: as many full passes, and as many draft steps."""
    decoded = case.generate(Speculative(case.draft_length))
    policy = Policy(draft_length=case.draft_length, max_pending=case.max_pending)
    full, slim, steps = spent(replay([policy], table_of([case])))
    assert (full, slim) == counts_of([decoded])[:2]
    if case.drafter_kind not in ("lookup", "lookup+near", "lookup+shallow"):  # a search counts as a step, and is free
        assert steps == counts_of([decoded])[2]


@settings(max_examples=12)
@given(
    case=cases(drafter_kind=st.sampled_from(["near", "itself", "causal", "shallow"]), count=st.integers(20, 40)),
    pays_at=st.floats(0.2, 1),
)
def test_where_drafting_is_watched_speculative_counts_are_the_decoders(case: Case, pays_at: float) -> None:
    decoded = case.generate(Speculative(case.draft_length, drafting_pays_at=pays_at))
    policy = Policy(draft_length=case.draft_length, max_pending=case.max_pending, drafting_pays_at=pays_at)
    assert spent(replay([policy], table_of([case]))) == counts_of([decoded])


@settings(max_examples=12)
@given(case=cases(drafter_kind=st.sampled_from(TRUE_DRAFTERS)))
def test_without_drafting_every_token_is_a_pass_of_one(case: Case) -> None:
    found = replay([Policy(draft_length=0)], table_of([case]))
    assert spent(found) == (len(case.expected), 0, 0)
    assert int(found.full[0, 1]) == found.tokens


@given(case=cases(drafter_kind=st.sampled_from(["near", "itself", "causal", "shallow"])), stop=st.floats(0.1, 0.9))
def test_a_stop_bound_takes_as_many_full_passes(case: Case, stop: float) -> None:
    """Draft steps after a wrong token are those of q's text, which the decoder does not see: not compared."""
    assert case.gates.draft is not None
    decoded = case.generate(Speculative(case.draft_length, Gate(case.gates.draft), stop))
    policy = Policy(draft_length=case.draft_length, stop_below=stop)
    assert spent(replay([policy], table_of([case])))[0] == decoded.counts.full_passes


def exact_case(seed: int, drafter: str, length: int, pending: int, bound: float) -> Case:
    """q' is q, and its gate trusts its own choice alone: it may be unsure, and is never wrong."""
    case = lively_case(seed)
    gates = case.gates.model_copy(
        update={"slim": SAME_CHOICE, "accept_at": bound, "regenerate_at": bound, "draft_accept_at": NEVER}
    )
    return dataclasses.replace(
        case, gates=gates, route=Route(), drafter_kind=drafter, draft_length=length, max_pending=pending
    )


@given(
    seed=st.integers(0, 40), drafter=st.sampled_from(TRUE_DRAFTERS), length=st.integers(0, 6),
    pending=st.integers(0, 20), bound=st.floats(0.4, 0.9),
)  # fmt: skip
def test_three_tier_counts_are_exact_where_no_wrong_token_waits(
    seed: int, drafter: str, length: int, pending: int, bound: float
) -> None:
    case = exact_case(seed, drafter, length, pending, bound)
    policy = Policy(draft_length=length, accept_at=bound, max_pending=pending)
    found = replay([policy], table_of([case]))
    assert int(found.wrong) == 0
    decoded = case.generate(case.method())
    assert spent(found)[:2] == counts_of([decoded])[:2]


@given(
    seed=st.integers(0, 40), drafter=st.sampled_from(["near", "causal", "shallow"]), length=st.integers(1, 6),
    pending=st.integers(0, 20), pays_at=st.floats(0.2, 1),
)  # fmt: skip
def test_three_tier_counts_are_exact_there_where_drafting_is_watched(
    seed: int, drafter: str, length: int, pending: int, pays_at: float
) -> None:
    case = exact_case(seed, drafter, length, pending, 0.6)
    policy = Policy(draft_length=length, accept_at=0.6, max_pending=pending, drafting_pays_at=pays_at)
    found = replay([policy], table_of([case]))
    decoded = case.generate(dataclasses.replace(case.method(), drafting_pays_at=pays_at))
    assert spent(found)[:2] == counts_of([decoded])[:2]


def test_those_texts_are_no_trivial_ones() -> None:
    """q' decides and escalates, and tokens are accepted and regenerated, in the test above."""
    several = [exact_case(seed, "near", 3, 12, 0.6) for seed in range(6)]
    full, slim, _ = counts_of([case.generate(case.method()) for case in several])
    tokens = sum(len(case.expected) for case in several)
    assert 0.1 * tokens < full < 0.6 * tokens
    assert slim > full / 2


@pytest.mark.parametrize("draft_accept_at", [NEVER, 0.65])
def test_wrong_tokens_are_counted_within_a_tenth(draft_accept_at: float) -> None:
    """A q' that is often wrong, over many texts: full and slim passes are predicted to within 10 %."""
    several = []
    for seed in range(12):
        case = lively_case(seed)
        gates = case.gates.model_copy(update={"draft_accept_at": draft_accept_at})
        several.append(dataclasses.replace(case, gates=gates))
    policy = Policy(
        draft_length=several[0].draft_length, accept_at=0.55, max_pending=12, draft_accept_at=draft_accept_at
    )
    found = replay([policy], table_of(several, ages=13))
    assert int(found.wrong) > 10
    full, slim, steps = counts_of([case.generate(case.method()) for case in several])
    assert spent(found) == pytest.approx((full, slim, steps), rel=0.1)


def test_policies_do_not_depend_on_each_other() -> None:
    """One at a time and all at once, in any order: the same counts."""
    texts = table_of([lively_case(seed) for seed in range(4)])
    policies = [
        Policy(draft_length=length, stop_below=stop, accept_at=accept_at, max_pending=pending)
        for length in (0, 2, 5)
        for stop in (0.0, 0.5)
        for accept_at in (0.6, NEVER)
        for pending in (4, 12)
    ]
    together, backwards = replay(policies, texts), replay(policies[::-1], texts)
    for number, policy in enumerate(policies):
        alone = replay([policy], texts)
        for found, row in ((together, number), (backwards, len(policies) - 1 - number)):
            assert (
                int(found.full[row].sum()), int(found.slim[row].sum()), int(found.draft_steps[row]),
                int(found.rounds[row]), int(found.wrong[row]),
            ) == (*spent(alone), int(alone.rounds), int(alone.wrong))  # fmt: skip


def test_passes_are_counted_by_width() -> None:
    """A drafter that is always right: every pass of q is over its block and the token before it."""
    case = dataclasses.replace(lively_case(1), drafter_kind="itself", draft_length=3)
    found = replay([Policy(draft_length=3)], table_of([case]))
    assert case.count == 32
    assert found.full[0].nonzero()[:, 0].tolist() == [4]
    assert int(found.full[0, 4]) == 8
