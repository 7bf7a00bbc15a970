"""The slim tier is left out unless it is shown to make exact decoding faster."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from pydantic import ValidationError
from torch import Tensor

from tests.timings import make_policy, make_timing
from tests.tiny import constant_gate, make_drafter, tiny_prompts
from viasd_calib.calibration import paired, policy_search
from viasd_calib.calibration.paired import FEWEST_PROMPTS, Interval
from viasd_calib.calibration.policy_timing import Decision, PolicyTiming, TimedPolicy, Tried, without_slim
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.conversation import Answering, converse
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.decoding.strategies.three_tier import NEVER, ThreeTier
from viasd_calib.models import Verifier
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.spec import Audit, Decoding, Gates, PolicyDrafter, Route

GATES = Gates(
    draft=constant_gate("draft_margin", 0.0),
    slim=constant_gate("slim_margin", 0.0),
    draft_accept_at=0.9,
    accept_at=0.4,
    regenerate_at=0.4,
    draft_stop_below=0.3,
)
"""Every score is 0.5: q' decides all, the draft gate nothing."""


LUCKY = 7 * (4 + 11) + 1  # what drafts nothing is not counted
"""The first call of the last stage: seven prompts, one a warm-up, for all policies of the first two."""


class Clock(RoutedModel):
    """A verifier whose passes, and nothing else, take time."""

    full_seconds = 1.0
    slim_seconds = 1.0
    now = 0.0

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def full(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        self.now += self.full_seconds
        return super().full(ids, window, taps)

    def slim(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        self.now += self.slim_seconds
        return super().slim(ids, window, taps)


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize(("slim_seconds", "pays"), [(1.0, False), (0.01, True)])
def test_the_clock_decides(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch, slim_seconds: float, pays: bool, certified: bool
) -> None:
    """A q' that is q itself is always right: its passes pay where they are cheap, and not where they cost as much."""
    routed = Clock(tiny_verifier.model, Route())
    routed.slim_seconds = slim_seconds
    monkeypatch.setattr(paired, "time", routed)
    monkeypatch.setattr(paired, "FEWEST_PROMPTS", 2)  # nothing varies on this clock
    monkeypatch.setattr(policy_search, "STRICT_STOPS", ())
    drafter = make_drafter("near", routed)

    def decoder_for(tried: Tried, audit: Audit) -> Decoder:
        decoding = Decoding(audit=audit, draft_length=2, max_pending=tried.max_pending or 12, drafter=tried.drafter)
        return Decoder(routed, drafter, ThreeTier.from_spec(tried.gates, decoding))

    measured = policy_search.time_policies(
        decoder_for, GATES, tiny_verifier, tiny_prompts(2), 16, deciding=tiny_prompts(2),
        stop_without_slim=0.3, max_pending=12, draft_length=2, certified=certified,
    )  # fmt: skip
    assert measured.pays is pays
    assert (measured.decision.certified is not None) == certified
    assert measured.n_prompts == 2
    assert sorted(measured.by_bound) == sorted([0.4, *policy_search.STRICT_THRESHOLDS])  # the gates' own is tried too
    assert measured.by_bound[0.7] == pytest.approx(measured.by_bound[0.85])  # no score of 0.5 meets them
    if pays:
        assert measured.threshold <= 0.5
        assert measured.decision.with_slim < measured.by_bound[0.7]
        if certified:  # nothing diverges from a q' that is q, and cheap slim passes settle all
            assert measured.decision.certified < measured.decision.without_slim  # type: ignore[operator]


def test_of_too_few_prompts_nothing_pays() -> None:
    few, enough = (make_timing(0.01, 0.02, 0.001, n_prompts=count) for count in (FEWEST_PROMPTS - 1, FEWEST_PROMPTS))
    assert (few.pays, few.lossy_pays) == (False, False)
    assert (enough.pays, enough.lossy_pays) == (True, True)


@pytest.mark.parametrize(("low", "pays"), [(0.99, False), (1.01, True)])
def test_a_slim_tier_that_is_faster_in_the_mean_alone_is_left_out(low: float, pays: bool) -> None:
    timing = make_timing(0.0185, 0.02, slim_speed=Interval(median=1.08, low=low, high=1.15, n=24))
    assert timing.pays is pays
    assert timing.exact_policy.slim_tier is pays
    assert timing.seconds_per_token_exact == (0.0185 if pays else 0.02)


@pytest.mark.parametrize(("saved", "low", "pays"), [(0.04, 1.02, False), (0.06, 1.02, True), (0.06, 0.99, False)])
def test_a_text_that_may_diverge_must_save_more_than_noise(saved: float, low: float, pays: bool) -> None:
    speed = Interval(median=1 / (1 - saved), low=low, high=1.2, n=24)
    assert make_timing(0.01, 0.02, 0.01 * (1 - saved), certified_speed=speed).lossy_pays is pays


def test_the_draft_model_alone_is_trusted_less_than_the_slim_verifier() -> None:
    stage = policy_search.threshold_stage(GATES.model_copy(update={"accept_at": 0.95}))
    assert [(one.gates.accept_at, one.gates.regenerate_at, one.gates.draft_accept_at) for one in stage] == [
        (0.5, 0.5, 0.9), (0.7, 0.7, 0.9), (0.85, 0.85, 0.9), (0.95, 0.95, 0.95)
    ]  # fmt: skip
    assert {one.gates.draft_stop_below for one in stage} == {GATES.draft_stop_below}
    assert all(one.gates.slim == GATES.slim and one.drafter is None for one in stage)


def test_without_slim_no_slim_pass_is_made(tiny_verifier: Verifier) -> None:
    """The text stays; draft gate and stopping stay; q' is not run."""
    routed = RoutedModel(tiny_verifier.model, Route(attention_skip=[1]))
    texts = []
    for gates in (GATES, without_slim(GATES)):
        decoder = Decoder(routed, make_drafter("near", routed), ThreeTier.from_spec(gates, Decoding(audit="strict")))
        (turn,) = converse(decoder, tiny_verifier, tiny_prompts(1)[0], 16)
        texts.append(turn.generation.tokens)
        assert (turn.generation.counts.slim_passes > 0) == gates.slim_tier
    assert texts[0] == texts[1]
    assert (without_slim(GATES).draft_accept_at, without_slim(GATES).slim) == (0.9, GATES.slim)


class Priced:
    """Answers with one token, which takes what ``price`` says of the policy; in place of the module ``time``, too."""

    def __init__(
        self,
        price: Callable[[Gates, Audit], float],
        without_model: Callable[[Gates, PolicyDrafter], float] | None = None,
        of_pending: Callable[[int | None], float] = lambda bound: 0.0 if bound is None else 0.1,
        nothing: float = 9.0,
        lookup_alone: float = 8.0,
        draft_length: int = 8,
    ) -> None:
        self.draft_length = draft_length
        self.price = price
        self.nothing = nothing
        self.lookup_alone = lookup_alone
        self.of_pending = of_pending
        self.without_model = without_model
        self.now = 0.0
        self.asked: list[Gates] = []

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def decoder_for(self, tried: Tried, audit: Audit) -> Answering:
        """A decoder with this price."""
        outer, gates, drafter = self, tried.gates, tried.drafter

        class OneToken:
            def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
                if drafter is None:
                    outer.now += outer.price(gates, audit)
                elif not gates.slim_tier:
                    outer.now += {"none": outer.nothing, "lookup": outer.lookup_alone}[drafter]
                else:
                    assert outer.without_model is not None, "nothing was asked for in the draft model's place"
                    assert audit == "strict"
                    outer.now += outer.without_model(gates, drafter)
                outer.now += outer.of_pending(tried.max_pending)
                outer.asked.append(gates)
                return Generation([1], [Tier.ESCALATE], [False], Counts())

        return OneToken()

    def search(self, verifier: Verifier, monkeypatch: pytest.MonkeyPatch, n_prompts: int = 6) -> PolicyTiming:
        """The search at these prices; a replay found stops of 0.3 with the slim tier and 0.2 without."""
        monkeypatch.setattr(paired, "time", self)
        return policy_search.time_policies(
            self.decoder_for, GATES, verifier, tiny_prompts(n_prompts), 4, deciding=tiny_prompts(n_prompts),
            stop_without_slim=0.2, max_pending=24, draft_length=self.draft_length, certified=True,
            drafters=() if self.without_model is None else ("slim", "lookup"),
        )  # fmt: skip


def price(gates: Gates, audit: Audit, with_slim: float = 1.0) -> float:
    """Least at threshold 0.7 and stop 0.55 with a draft gate that accepts nothing; without q' 2, least at stop 0.35."""
    if audit == "off":
        return 5.0
    if not gates.slim_tier:
        return 2.0 + abs(gates.draft_stop_below - 0.35)
    gated = 0.2 if gates.draft_accept_at <= 1 else 0.0
    return with_slim + abs(gates.accept_at - 0.7) + abs(gates.draft_stop_below - 0.55) + gated


def test_what_is_exported_is_the_policy_that_won(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Priced(price).search(tiny_verifier, monkeypatch)
    assert timing.pays
    assert timing.threshold == 0.7
    assert timing.decision.with_slim == pytest.approx(1.0)
    assert timing.decision.without_slim == pytest.approx(2.0)
    assert timing.decision.certified == pytest.approx(5.0)
    assert timing.decision.slim_speed == Interval(median=2.0, low=2.0, high=2.0, n=6)
    gates = timing.exact_policy.applied_to(GATES)
    assert (gates.accept_at, gates.regenerate_at, gates.draft_accept_at) == (0.7, 0.7, NEVER)
    assert gates.draft_stop_below == 0.55
    assert (gates.draft, gates.slim) == (GATES.draft, GATES.slim)


@pytest.mark.parametrize(("with_slim", "n_prompts"), [(3.0, 6), (1.0, 5)])
def test_without_the_slim_tier_its_own_stop_is_exported(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch, with_slim: float, n_prompts: int
) -> None:
    """Where it is slower, and where too few prompts were timed to say."""
    priced = Priced(lambda gates, audit: price(gates, audit, with_slim))
    timing = priced.search(tiny_verifier, monkeypatch, n_prompts)
    assert not timing.pays
    gates = timing.exact_policy.applied_to(GATES)
    assert gates == without_slim(GATES).model_copy(update={"draft_stop_below": 0.35})


def test_all_that_was_tried_is_in_the_json(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    priced = Priced(price)
    timing = PolicyTiming.model_validate_json(priced.search(tiny_verifier, monkeypatch).model_dump_json())
    tried = [(one.stage, one.threshold, one.draft_accept_at, one.draft_stop_below) for one in timing.policies]
    assert tried == [
        *((1, threshold, 0.9, 0.3) for threshold in (0.4, 0.5, 0.7, 0.85)),
        *((2, 0.7, accept, stop) for accept in (0.9, NEVER) for stop in (0.3, 0.4, 0.55, 0.7)),
        *((2, None, 0.9, stop) for stop in (0.05, 0.2, 0.35)),
        (2, None, 0.9, 0.3),
        (3, 0.7, NEVER, 0.55), (3, None, 0.9, 0.35), (3, None, 0.9, 0.3), *[(3, 0.7, NEVER, 0.55)] * 2,
    ]  # fmt: skip
    assert [one.max_pending for one in timing.policies] == [None] * 19 + [12, 17]
    assert timing.by_bound == {one.threshold: one.seconds_per_token for one in timing.policies if one.stage == 1}
    for one in timing.policies:
        more = priced.of_pending(one.max_pending)
        own = price(one.applied_to(GATES), "strict") if one.drafter is None else priced.nothing
        assert one.seconds_per_token == pytest.approx(own + more)
    again = Priced(price)
    again.search(tiny_verifier, monkeypatch)
    assert again.asked == priced.asked, "the same order every time"


@pytest.mark.parametrize(
    ("slim", "lookup", "n_prompts", "won"),
    [
        (0.5, 0.8, 6, "slim"), (0.9, 0.6, 6, "lookup"), (1.2, 1.3, 6, None), (0.5, 0.8, 5, None), (5.0, 5.0, 6, None)
    ],
)  # fmt: skip
def test_no_draft_model_is_exported_where_that_is_the_fastest(
    tiny_verifier: Verifier,
    monkeypatch: pytest.MonkeyPatch,
    slim: float,
    lookup: float,
    n_prompts: int,
    won: PolicyDrafter | None,
) -> None:
    """Not where the draft model saves time, and not where too few prompts were timed to say."""

    def without_model(gates: Gates, drafter: PolicyDrafter) -> float:
        return abs(gates.accept_at - 0.7) + {"slim": slim, "lookup": lookup}[drafter]

    timing = Priced(price, without_model).search(tiny_verifier, monkeypatch, n_prompts)
    timing = PolicyTiming.model_validate_json(timing.model_dump_json())
    tried = [(one.stage, one.drafter, one.threshold) for one in timing.policies if one.drafter is not None]
    assert tried[:6] == [
        (1, "slim", 0.4), (1, "slim", 0.7), (2, "lookup", None), (2, "none", None), (2, "slim", 0.7), (2, "lookup", 0.7)
    ]  # fmt: skip
    last = sorted((one.drafter or "model", one.max_pending or 24) for one in timing.policies if one.stage == 3)
    fastest = min(("slim", slim), ("lookup", lookup), ("model", 1.0), key=lambda one: one[1])[0]
    kinds = [("slim", 24), ("none", 24), *[("lookup", 24), ("model", 24)] * 2]  # with the slim tier, and without
    assert last == sorted([*kinds, (fastest, 12), (fastest, 17)])
    best = timing.exact_policy
    assert best.drafter == won
    if won is not None:
        assert best.seconds_per_token == pytest.approx(min(slim, lookup))
        assert (best.threshold, best.draft_accept_at) == (0.7, NEVER)
    assert timing.by_bound.keys() == {0.4, 0.5, 0.7, 0.85}, "of policies with the draft model"
    words = timing.drafter_words()
    if n_prompts < 6:
        assert words is None
    elif won is None:
        assert words is not None
        assert words.startswith("The draft model pays: a token took ")
        assert words.endswith("and 1000.0 ms with it.")
    else:
        said = {"slim": "the slim verifier writes token by token", "lookup": "lookup drafts"}[won]
        best_ms = 1000 * best.seconds_per_token
        assert (
            words
            == f"No draft model is the fastest: a token took {best_ms:.1f} ms without ({said}) and 1000.0 ms with it."
        )


@pytest.mark.parametrize(("cheapest", "found"), [(24, None), (12, 12), (17, 17)])
def test_fewer_pending_tokens_are_exported_where_they_are_faster(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch, cheapest: int, found: int | None
) -> None:
    priced = Priced(price, of_pending=lambda bound: 0.01 * abs((bound or 24) - cheapest))
    timing = priced.search(tiny_verifier, monkeypatch)
    assert timing.exact_policy.max_pending == found
    assert timing.decision.with_slim == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("nothing", "lookup_alone", "with_slim", "n_prompts", "won"),
    [
        (0.5, 8.0, 1.0, 6, "none"), (0.9, 8.0, 1.0, 6, "none"), (8.0, 0.5, 1.0, 6, "lookup"),
        (1.5, 8.0, 3.0, 6, "none"), (1.1, 1.2, 1.0, 6, "slim tier"), (2.5, 8.0, 3.0, 6, None), (1.5, 8.0, 3.0, 5, None),
    ],
)  # fmt: skip
def test_no_exact_policy_loses_to_a_simpler_one(
    tiny_verifier: Verifier,
    monkeypatch: pytest.MonkeyPatch,
    nothing: float,
    lookup_alone: float,
    with_slim: float,
    n_prompts: int,
    won: str | None,
) -> None:
    """Nothing drafted, or lookup alone, is exported where that is the fastest, and where enough prompts were timed."""
    priced = Priced(
        lambda gates, audit: price(gates, audit, with_slim), lambda *_: 7.0, nothing=nothing, lookup_alone=lookup_alone
    )
    timing = priced.search(tiny_verifier, monkeypatch, n_prompts)
    timing = PolicyTiming.model_validate_json(timing.model_dump_json())
    best = timing.exact_policy
    assert ("slim tier" if best.slim_tier else best.drafter) == won
    assert timing.decision.baselines == pytest.approx(
        {"speculative": 2.0, "no drafting": nothing, "lookup alone": lookup_alone}
    )
    if n_prompts > 5:
        assert timing.seconds_per_token_exact == pytest.approx(min(nothing, lookup_alone, with_slim, 2.0))
    assert timing.speculative_stop == 0.35, "of speculative decoding, whatever is exported"


def test_a_slim_tier_must_be_faster_than_every_baseline(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clearly faster than one of them, and not shown to be than the other, which varies: it is left out."""
    clock = Priced(price)
    monkeypatch.setattr(paired, "time", clock)
    slim = Varying([0.8] * 24, True, clock)
    steady, varying = Varying([1.0], False, clock), Varying([0.5, 1.3] * 12, True, clock)
    decision = policy_search.decide(slim, {None: steady, "none": varying}, None, tiny_verifier, tiny_prompts(24), 4)
    assert decision.baselines["speculative"] == pytest.approx(1.0)
    assert decision.without_drafter == "none"
    assert not decision.slim_speed.above_one
    assert policy_search.decide(slim, {None: steady}, None, tiny_verifier, tiny_prompts(24), 4).slim_speed.above_one


@pytest.mark.parametrize(("draft_length", "bounds"), [(8, [12, 17]), (12, [17]), (17, [])])
def test_bounds_without_room_for_a_block_are_not_tried(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch, draft_length: int, bounds: list[int]
) -> None:
    """The slim verifier would not be asked: decoding without it would be timed under its name."""
    timing = Priced(price, draft_length=draft_length).search(tiny_verifier, monkeypatch)
    assert [one.max_pending for one in timing.policies if one.max_pending is not None] == bounds


def test_the_luckiest_of_many_is_timed_again(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that was fast by chance in the second stage is not exported for it."""
    calls = []

    def lucky_once(gates: Gates, audit: Audit) -> float:
        calls.append(audit)
        by_chance = len(calls) < LUCKY and gates.slim_tier
        return 0.5 if by_chance else price(gates, audit, with_slim=3.0)

    timing = Priced(lucky_once).search(tiny_verifier, monkeypatch)
    assert min(one.seconds_per_token for one in timing.policies if one.stage == 2) < 1
    assert not timing.pays


def test_what_was_timed_earlier_decides_nothing() -> None:
    """The machine slows down after the first stage: its times are not held against those of the second."""
    rows = [(1, 0.7, 0.4, 0.01), (2, 0.7, 0.4, 0.04), (2, 0.7, 0.55, 0.03), (2, None, 0.2, 0.02)]
    policies = [
        make_policy(threshold is not None, seconds, stage=stage, draft_stop_below=stop)
        for stage, threshold, stop, seconds in rows
    ]
    timing = make_timing(0.03, 0.02, policies=policies)
    assert (timing.fastest_with_slim.seconds_per_token, timing.pays) == (0.03, False)
    assert timing.exact_policy.draft_stop_below == 0.2


class Varying:
    """One token a prompt; the slim tier saves a share of its time that varies from prompt to prompt."""

    def __init__(self, ratios: Sequence[float], with_slim: bool, clock: Priced) -> None:
        self.ratios = itertools.cycle([ratios[0], *ratios])  # the first prompt is the warm-up, too
        self.with_slim = with_slim
        self.clock = clock
        self.answered = 0

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
        self.clock.now += next(self.ratios) if self.with_slim else 1.0
        self.answered += 1
        return Generation([1], [Tier.ESCALATE], [False], Counts())


def decided(ratios: Sequence[float], verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> tuple[Decision, int]:
    """The decision, and how many prompts it took, where a token takes this share of its time with the slim tier."""
    clock = Priced(price)
    monkeypatch.setattr(paired, "time", clock)
    with_slim, without = (Varying(ratios, slim, clock) for slim in (True, False))
    decision = policy_search.decide(with_slim, {None: without}, None, verifier, tiny_prompts(len(ratios)), 4)
    return decision, without.answered - 1


def test_a_timing_that_decides_ends_where_it_is_clear(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    clear, took = decided([0.8, 0.7] * 12, tiny_verifier, monkeypatch)
    assert (took, clear.slim_speed.n, clear.slim_speed.above_one) == (8, 8, True)
    slower, took = decided([1.1, 1.3] * 12, tiny_verifier, monkeypatch)
    assert (took, slower.slim_speed.leaves_out_one, slower.slim_speed.above_one) == (8, True, False)
    unclear, took = decided([0.5, 1.5] * 12, tiny_verifier, monkeypatch)
    assert (took, unclear.slim_speed.n, unclear.slim_speed.leaves_out_one) == (24, 24, False)


def test_looking_three_times_errs_no_more_often_than_stated(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios of times, log-normal with mean 1: the slim tier is called faster in at most 2.5 of 100 timings.
    Of 300, more than 18 are called so with a probability of 3e-4.
    """
    draws = np.random.default_rng(0).normal(-(0.2**2) / 2, 0.2, (300, 24))  # their mean is 1
    faster = sum(decided(np.exp(row).tolist(), tiny_verifier, monkeypatch)[0].slim_speed.above_one for row in draws)
    assert faster <= 18
    monkeypatch.setattr(policy_search, "ERROR", 3 * 3 * policy_search.ERROR)
    negligent = sum(decided(np.exp(row).tolist(), tiny_verifier, monkeypatch)[0].slim_speed.above_one for row in draws)
    assert negligent > 18, "a control that must fail: each look with three times the whole error"


@pytest.mark.parametrize(("slim_tier", "threshold"), [(True, None), (False, 0.7)])
def test_a_threshold_belongs_to_the_slim_tier(slim_tier: bool, threshold: float | None) -> None:
    with pytest.raises(ValidationError, match="a threshold is given where the slim tier is asked"):
        TimedPolicy(
            stage=1, slim_tier=slim_tier, threshold=threshold, draft_accept_at=0.9, draft_stop_below=0.4,
            seconds_per_token=1.0,
        )  # fmt: skip
