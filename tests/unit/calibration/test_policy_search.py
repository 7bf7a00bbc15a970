"""The slim tier is left out unless it is shown to make exact decoding faster."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.timings import make_timing
from tests.tiny import constant_gate, make_drafter, tiny_prompts
from viasd_calib.calibration import paired, policy_search
from viasd_calib.calibration.paired import FEWEST_PROMPTS, Interval
from viasd_calib.calibration.policy_timing import Decision, PolicyTiming, TimedPolicy
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.conversation import Answering
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.policies import Policy
from viasd_calib.decoding.session import Counts, Generation
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.three_tier import NEVER, ThreeTier
from viasd_calib.models import Verifier
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.spec import Audit, Decoding, Gates, Route

GATES = Gates(
    draft=constant_gate("draft_margin", 0.0),
    slim=constant_gate("slim_margin", 0.0),
    accept_at=0.4,
    regenerate_at=0.4,
)
"""Every score is 0.5: q' decides all below that threshold."""

TIERS, CAREFUL = Policy(None, 2, 0.3, accept_at=0.5), Policy(None, 2, 0.3, accept_at=0.7)
SPECULATIVE, LATER = Policy(None, 2, 0.3), Policy(None, 2, 0.45)
SLIM, SLIM_LOOKUP = Policy("slim", 0, accept_at=0.4), Policy("lookup", 2, accept_at=0.4)
LOOKUP, NOTHING = Policy("lookup", 2), Policy("none", 0)
EVERY = (TIERS, CAREFUL, SPECULATIVE, LATER, SLIM, SLIM_LOOKUP, LOOKUP, NOTHING)


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
    drafter = make_drafter("near", routed)

    def decoder_of(policy: Policy, audit: Audit = "strict") -> Decoder:
        gates, decoding = policy.planned().applied_to(GATES, Decoding(audit=audit))
        return Decoder(routed, drafter, ThreeTier.from_spec(gates, decoding))

    measured = policy_search.time_policies(
        decoder_of, dict.fromkeys((TIERS, CAREFUL, SPECULATIVE), 0.5), tiny_verifier, tiny_prompts(2), 16,
        deciding=tiny_prompts(2), certified=decoder_of(TIERS, "off") if certified else None,
    )  # fmt: skip
    assert measured.pays is pays
    assert (measured.decision.certified is not None) == certified
    assert measured.n_prompts == 2
    tiers, careful, _ = measured.policies
    assert tiers.predicted == 0.5
    if pays:
        assert measured.exact_policy == tiers, "no score of 0.5 meets the other one's threshold"
        assert measured.decision.with_slim == pytest.approx(tiers.seconds_per_token)
        assert tiers.seconds_per_token < careful.seconds_per_token
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
    assert timing.exact_policy.policy.slim_tier is pays
    assert timing.seconds_per_token_exact == (0.0185 if pays else 0.02)


@pytest.mark.parametrize(("saved", "low", "pays"), [(0.04, 1.02, False), (0.06, 1.02, True), (0.06, 0.99, False)])
def test_a_text_that_may_diverge_must_save_more_than_noise(saved: float, low: float, pays: bool) -> None:
    speed = Interval(median=1 / (1 - saved), low=low, high=1.2, n=24)
    assert make_timing(0.01, 0.02, 0.01 * (1 - saved), certified_speed=speed).lossy_pays is pays


class Priced:
    """Answers with one token, which takes what ``price`` says of the policy; in place of the module ``time``, too."""

    def __init__(self, price: Callable[[Policy], float], certified: float = 5.0) -> None:
        self.price = price
        self.certified = certified
        self.now = 0.0
        self.asked: list[Policy | None] = []

    def perf_counter(self) -> float:
        """The time, in seconds."""
        return self.now

    def decoder_of(self, policy: Policy | None) -> Answering:
        """A decoder with this price; None for the certified policy."""
        outer = self

        class OneToken:
            def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Generation:
                outer.now += outer.certified if policy is None else outer.price(policy)
                outer.asked.append(policy)
                return Generation([1], [Tier.ESCALATE], [False], Counts())

        return OneToken()

    def search(
        self,
        verifier: Verifier,
        monkeypatch: pytest.MonkeyPatch,
        n_prompts: int = 6,
        policies: Sequence[Policy] = EVERY,
    ) -> PolicyTiming:
        """The search at these prices, each predicted to take twice as long; as it is read back from JSON."""
        monkeypatch.setattr(paired, "time", self)
        timing = policy_search.time_policies(
            self.decoder_of, {one: 2 * self.price(one) for one in policies}, verifier, tiny_prompts(n_prompts), 4,
            deciding=tiny_prompts(n_prompts), certified=self.decoder_of(None),
        )  # fmt: skip
        return PolicyTiming.model_validate_json(timing.model_dump_json())


def priced(**changes: float) -> Callable[[Policy], float]:
    """Three tiers 1, careful ones 1.2, speculative 2, a later stop 1.9, all others 8, but for changes by name."""
    names = ("tiers", "careful", "speculative", "later", "slim", "slim_lookup", "lookup", "nothing")
    usual = {"tiers": 1.0, "careful": 1.2, "speculative": 2.0, "later": 1.9}
    prices = {policy: {**usual, **changes}.get(name, 8.0) for name, policy in zip(names, EVERY, strict=True)}
    return lambda policy: prices[policy]


def test_what_is_exported_is_the_policy_that_won(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Priced(priced()).search(tiny_verifier, monkeypatch)
    assert timing.pays
    assert timing.exact_policy.policy == TIERS
    assert timing.decision.with_slim == pytest.approx(1.0)
    assert timing.decision.without_slim == pytest.approx(1.9)
    assert timing.decision.certified == pytest.approx(5.0)
    assert timing.decision.slim_speed.model_dump() == pytest.approx({"median": 1.9, "low": 1.9, "high": 1.9, "n": 6})


@pytest.mark.parametrize(("tiers", "n_prompts"), [(3.0, 6), (1.0, 5)])
def test_without_the_slim_tier_plain_speculative_decoding_is_exported(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch, tiers: float, n_prompts: int
) -> None:
    """Where it is slower, and where too few prompts were timed to say: the draft gate accepts nothing there."""
    timing = Priced(priced(tiers=tiers, careful=tiers)).search(tiny_verifier, monkeypatch, n_prompts)
    assert not timing.pays
    assert timing.exact_policy.policy == LATER
    gates, _ = LATER.planned().applied_to(GATES, Decoding())
    assert (gates.draft_accept_at, gates.accept_at, gates.regenerate_at) == (NEVER, NEVER, NEVER)
    assert (gates.draft_stop_below, timing.speculative_stop) == (0.45, 0.45)


def test_few_policies_are_decoded_and_the_fastest_of_each_kind_decide(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six prompts and a warm-up each: all eight in turns, then those of three kinds and the certified one.

    Drafting nothing takes more than twice the time of speculative decoding, and is out of the question.
    """
    clock = Priced(priced(lookup=3.7))
    timing = clock.search(tiny_verifier, monkeypatch)
    assert [one.policy for one in timing.policies] == [*EVERY]
    assert [one.seconds_per_token for one in timing.policies] == pytest.approx([clock.price(one) for one in EVERY])
    assert len(clock.asked) == 7 * (8 + 4)
    assert set(clock.asked[7 * 8 :]) == {TIERS, LATER, LOOKUP, None}
    again = Priced(priced(lookup=3.7))
    again.search(tiny_verifier, monkeypatch)
    assert again.asked == clock.asked, "the same order every time"


@pytest.mark.parametrize(
    ("slim", "slim_lookup", "n_prompts", "won"),
    [
        (0.5, 0.8, 6, SLIM), (0.9, 0.6, 6, SLIM_LOOKUP), (1.2, 1.3, 6, TIERS), (0.5, 0.8, 5, LATER),
        (5.0, 5.0, 6, TIERS),
    ],
)  # fmt: skip
def test_no_draft_model_is_exported_where_that_is_the_fastest(
    tiny_verifier: Verifier,
    monkeypatch: pytest.MonkeyPatch,
    slim: float,
    slim_lookup: float,
    n_prompts: int,
    won: Policy,
) -> None:
    """Not where the draft model saves time, and not where too few prompts were timed to say."""
    clock = Priced(priced(slim=slim, slim_lookup=slim_lookup))
    timing = clock.search(tiny_verifier, monkeypatch, n_prompts)
    assert timing.exact_policy.policy == won
    words = timing.drafter_words()
    if n_prompts < 6:
        assert words is None
    elif won == TIERS:
        assert words is not None
        assert words.startswith("The draft model pays: a token took ")
        assert words.endswith("and 1000.0 ms with it.")
    else:
        said = {"slim": "the slim verifier writes token by token", "lookup": "lookup drafts"}
        ms = 1000 * min(slim, slim_lookup)
        assert words == (
            f"No draft model is the fastest: a token took {ms:.1f} ms without ({said[str(won.drafter)]}) and 1000.0 ms "
            "with it."
        )


@pytest.mark.parametrize(
    ("nothing", "lookup", "tiers", "n_prompts", "won"),
    [
        (0.5, 8.0, 1.0, 6, NOTHING), (0.9, 8.0, 1.0, 6, NOTHING), (8.0, 0.5, 1.0, 6, LOOKUP),
        (1.5, 8.0, 3.0, 6, NOTHING), (1.1, 1.15, 1.0, 6, TIERS), (2.5, 8.0, 3.0, 6, LATER), (1.5, 8.0, 3.0, 5, LATER),
    ],
)  # fmt: skip
def test_no_exact_policy_loses_to_a_simpler_one(
    tiny_verifier: Verifier,
    monkeypatch: pytest.MonkeyPatch,
    nothing: float,
    lookup: float,
    tiers: float,
    n_prompts: int,
    won: Policy,
) -> None:
    """Nothing drafted, or lookup alone, is exported where that is the fastest, and where enough prompts were timed."""
    clock = Priced(priced(nothing=nothing, lookup=lookup, tiers=tiers, careful=tiers))
    timing = clock.search(tiny_verifier, monkeypatch, n_prompts)
    assert timing.exact_policy.policy == won
    every = {"speculative": 1.9, "no drafting": nothing, "lookup alone": lookup}
    within = {kind: seconds for kind, seconds in every.items() if seconds <= 2 * min(every.values())}
    assert timing.decision.baselines == pytest.approx(within)
    if n_prompts > 5:
        assert timing.seconds_per_token_exact == pytest.approx(min(nothing, lookup, tiers, 1.9))
    assert timing.speculative_stop == 0.45, "of speculative decoding, whatever is exported"


def test_the_replay_is_held_against_what_was_decoded() -> None:
    """Twice as slow as predicted, all alike, is no error; the speed-up over no drafting is what is predicted."""
    rows = [(NOTHING, 8.0, 16.0), (SPECULATIVE, 4.0, 8.0), (TIERS, 2.0, 5.0)]
    policies = [TimedPolicy(policy=one, predicted=said, seconds_per_token=took) for one, said, took in rows]
    timing = make_timing(5.0, 8.0, policies=policies)
    assert [timing.speedup(one) for one in policies] == [(1.0, 1.0), (2.0, 2.0), (4.0, 3.2)]
    assert timing.prediction_words() == (
        "The replay predicted the speed-up over no drafting of 2 policies within 25% of what was decoded on 8 prompts."
    )
    assert [(one.policy, one.deviation) for one in timing.speedups()] == [(SPECULATIVE, 0.0), (TIERS, 0.25)]
    without = make_timing(5.0, 8.0, policies=policies[1:])
    assert without.speedups() == make_timing(5.0, 8.0, policies=policies[:1]).speedups() == []
    assert (without.speedup(policies[1]), without.prediction_words()) == (None, None)


def test_a_slim_tier_must_be_faster_than_every_baseline(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clearly faster than one of them, and not shown to be than the other, which varies: it is left out."""
    clock = Priced(priced())
    monkeypatch.setattr(paired, "time", clock)
    slim = Varying([0.8] * 24, True, clock)
    steady, varying = Varying([1.0], False, clock), Varying([0.5, 1.3] * 12, True, clock)
    decision = policy_search.decide(slim, {None: steady, "none": varying}, [], tiny_verifier, tiny_prompts(24), 4)
    assert decision.baselines["speculative"] == pytest.approx(1.0)
    assert decision.without_drafter == "none"
    assert not decision.slim_speed.above_one
    assert policy_search.decide(slim, {None: steady}, [], tiny_verifier, tiny_prompts(24), 4).slim_speed.above_one


def test_of_several_certified_policies_the_fastest_that_is_shown_to_be_faster_is_taken(
    tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that is faster in the mean alone; and each of them has its share of the error."""
    clock = Priced(priced())
    monkeypatch.setattr(paired, "time", clock)

    def decided_with(*ratios: Sequence[float]) -> Decision:
        slower, steady = Varying([1.2], True, clock), Varying([1.0], False, clock)
        certified = [Varying(one, True, clock) for one in ratios]
        return policy_search.decide(slower, {None: steady}, certified, tiny_verifier, tiny_prompts(24), 4)

    clear, clearer, noisy, slow = [0.8] * 24, [0.7] * 24, [0.02, 0.02, 1.9] * 8, [1.1] * 24
    found = decided_with(slow, clear, noisy, clearer)
    assert [one.speed.above_one for one in found.candidates] == [False, True, False, True]
    assert min(one.seconds_per_token for one in found.candidates) == found.candidates[2].seconds_per_token
    assert found.fastest_candidate == 3
    assert found.certified == pytest.approx(0.7)
    assert found.certified_speed == found.candidates[3].speed
    assert found.exact == pytest.approx(1.0)
    assert found.lossy_pays
    assert Decision.model_validate_json(found.model_dump_json()) == found
    nothing = decided_with(slow, noisy)
    assert (nothing.fastest_candidate, nothing.lossy_pays) == (None, False)
    assert (decided_with().candidates, decided_with().fastest_candidate) == ((), None)
    barely = [0.75, 1.02] * 12
    alone, among = decided_with(barely).candidates[0].speed, decided_with(barely, *[clear] * 9).candidates[0].speed
    assert alone.bounds is not None
    assert among.bounds is not None
    assert among.bounds[0] < alone.bounds[0], "wider, the more there are"


def test_policies_are_decided_between_in_batches(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 prompts in batches of 4: 8 batches, the interval of the first 6 of which may end the timing."""
    clock = Priced(priced())
    monkeypatch.setattr(paired, "time", clock)
    sizes: dict[bool, list[int]] = {True: [], False: []}

    class Together(Decoder):
        def __init__(self, fast: bool) -> None:
            super().__init__(RoutedModel(tiny_verifier.model), None, Autoregressive())
            self.fast = fast

        def generate_batch(self, prompts: Any, max_new_tokens: int, **more: Any) -> list[Generation]:
            sizes[self.fast].append(len(prompts))
            clock.now += 0.5 if self.fast else 1.0
            return super().generate_batch(prompts, max_new_tokens, **more)

    fast, slow = Together(True), Together(False)
    decision = policy_search.decide(fast, {"none": slow}, [], tiny_verifier, tiny_prompts(30), 4, batch=4)
    assert decision.slim_speed.n == 6
    assert decision.slim_speed.median == pytest.approx(2.0)
    assert decision.slim_speed.above_one
    assert sizes == {True: [4] * 7, False: [4] * 7}, "the first of them warms up"


def test_the_luckiest_is_not_exported_for_its_luck(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that was fast by chance among the others is decoded again, on the prompts that decide."""
    clock = Priced(priced())

    def lucky_at_first(policy: Policy) -> float:
        chosen = priced(tiers=0.5 if len(clock.asked) < 7 * len(EVERY) else 3.0, careful=4.0)
        return chosen(policy)

    clock.price = lucky_at_first
    timing = clock.search(tiny_verifier, monkeypatch)
    assert timing.fastest_with_slim.seconds_per_token < 1
    assert not timing.pays


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
    clock = Priced(priced())
    monkeypatch.setattr(paired, "time", clock)
    with_slim, without = (Varying(ratios, slim, clock) for slim in (True, False))
    decision = policy_search.decide(with_slim, {None: without}, [], verifier, tiny_prompts(len(ratios)), 4)
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
