"""The decoder's promises, over any route, gates, drafter and settings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.cases import Case, cases, lively_case
from tests.strategies import NEVER
from tests.tiny import (
    TINY_FAMILIES,
    constant_gate,
    make_drafter,
    spoil,
    tiny_config,
    tiny_model,
    transformers_logits,
)
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.ending import Ending
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import open_session
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.verification import make_sampler
from viasd_calib.errors import NumericsError, PromptError
from viasd_calib.passes.requests import finish
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Audit, Gates, Route

GREEDY = make_sampler(Sampling())


@settings(max_examples=40)
@given(case=cases())
def test_strict_text_is_the_verifiers_own(case: Case) -> None:
    """The main promise: whatever family, gates and route, the text is q's, by our loop and by transformers'."""
    expected = case.expected
    assert case.generate(Autoregressive()).tokens == expected
    assert case.generate(case.method()).tokens == expected


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_q_decides_not_alone_in_any_family(family: str) -> None:
    """Tokens wait for q, some in vain, far beyond every window; the text is q's."""
    tiers: Counter[Tier] = Counter()
    for seed in range(2):
        case = dataclasses.replace(lively_case(seed), family=family)
        out = case.generate(case.method())
        assert out.tokens == case.expected
        tiers.update(out.tiers)
    assert tiers[Tier.ACCEPT] + tiers[Tier.REGENERATE] > 0


@given(case=cases())
def test_a_strict_stream_is_the_same_text(case: Case) -> None:
    decoder = case.decoder(case.method())
    whole = decoder.generate(case.prompt, case.count)
    streamed = list(decoder.stream(case.prompt, case.count))
    assert [emitted.token for emitted in streamed] == whole.tokens == case.expected
    assert [emitted.tier for emitted in streamed] == whole.tiers


@given(case=cases(), audit=st.sampled_from(["tolerant", "off"]))
def test_a_lossy_stream_is_the_text_that_is_generated(case: Case, audit: Audit) -> None:
    decoder = case.decoder(case.method(audit))
    whole = decoder.generate(case.prompt, case.count)
    assert [emitted.token for emitted in decoder.stream(case.prompt, case.count)] == whole.tokens


@given(case=cases())
def test_speculative_text_is_the_verifiers_own(case: Case) -> None:
    gate = None if case.gates.draft is None else Gate(case.gates.draft)
    method = Speculative(case.draft_length, gate, case.gates.draft_stop_below)
    assert case.generate(method).tokens == case.expected


@given(case=cases())
def test_a_tolerance_of_one_is_strict(case: Case) -> None:
    one, other = case.generate(case.method("tolerant", 1.0)), case.generate(case.method())
    assert one == other


@given(case=cases(), audit=st.sampled_from(["strict", "tolerant", "off"]))
def test_a_text_ends_at_its_end(case: Case, audit: Audit) -> None:
    out = case.generate(case.method(audit))
    assert not case.eos.intersection(out.tokens[:-1])
    assert len(out.tokens) == case.count or (len(out.tokens) < case.count and out.tokens[-1] in case.eos)
    assert len(out.tiers) == len(out.drafted) == len(out.tokens)


@given(
    case=cases(),
    name=st.sampled_from(["autoregressive", "speculative", "strict", "tolerant", "off"]),
    temperature=st.sampled_from([0.7, 1.5]),
    seed=st.integers(0, 99),
)
def test_a_sampled_text_ends_at_its_end(case: Case, name: str, temperature: float, seed: int) -> None:
    assume(name != "strict" or case.gates.convention == "calibrated")  # the other looks at what was drawn
    methods: dict[str, Strategy] = {"autoregressive": Autoregressive(), "speculative": Speculative(case.draft_length)}
    method = methods[name] if name in methods else case.method(cast(Audit, name))
    out = case.decoder(method, Sampling(temperature=temperature, seed=seed)).generate(case.prompt, case.count)
    assert not case.eos.intersection(out.tokens[:-1])
    assert len(out.tokens) == case.count or (len(out.tokens) < case.count and out.tokens[-1] in case.eos)
    assert len(out.tiers) == len(out.drafted) == len(out.tokens)
    streamed = case.decoder(method, Sampling(temperature=temperature, seed=seed)).stream(case.prompt, case.count)
    assert [emitted.token for emitted in streamed] == out.tokens


@given(case=cases(), tolerance=st.floats(0.05, 1))
def test_a_tolerant_text_holds_what_q_finds_likely_enough(case: Case, tolerance: float) -> None:
    """Teacher-forced: at every token q(x) / max q reaches the tolerance."""
    out = case.generate(case.method("tolerant", tolerance))
    logits = transformers_logits(case.model, [*case.prompt, *out.tokens])[len(case.prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(out.tokens)[:, None])[:, 0]
    assert (chosen - logits.amax(-1)).exp().min().item() >= tolerance - 1e-4


@given(case=cases(), audit=st.sampled_from(["strict", "tolerant", "off"]))
def test_what_q_decided_is_qs_choice(case: Case, audit: Audit) -> None:
    """Also where the text before has diverged: a token of tier 3 is q's argmax after it."""
    out = case.generate(case.method(audit))
    logits = transformers_logits(case.model, [*case.prompt, *out.tokens])[len(case.prompt) - 1 : -1]
    pairs = zip(out.tokens, logits.argmax(-1).tolist(), out.tiers, strict=True)
    assert all(token == choice for token, choice, tier in pairs if tier == Tier.ESCALATE)


@given(case=cases(), audit=st.sampled_from(["strict", "tolerant", "off"]))
def test_counts_are_consistent(case: Case, audit: Audit) -> None:
    drafter, started = case.drafter, []
    start = drafter.start
    drafter.start = lambda capacity: started.append(start(capacity)) or started[-1]
    out = Decoder(case.verifier, drafter, case.method(audit), case.eos).generate(case.prompt, case.count)
    counts, (text,) = out.counts, started
    assert counts.full_passes <= len(out.tokens)  # each decides one token at least
    assert counts.draft_steps == text.steps
    assert counts.rejected >= 0
    assert Tier.REGENERATE not in out.tiers or counts.slim_passes > 0
    if audit == "strict":
        assert counts.full_passes > 0


@given(case=cases())
def test_autoregressive_takes_a_pass_a_token(case: Case) -> None:
    out = case.generate(Autoregressive())
    assert out.counts.full_passes == len(out.tokens)
    assert (out.counts.slim_passes, out.counts.draft_steps, out.counts.rejected) == (0, 0, 0)
    assert set(out.tiers) == {Tier.ESCALATE}
    assert not any(out.drafted)


@given(case=cases())
def test_speculative_counts(case: Case) -> None:
    """A pass emits its accepted tokens and one of q's own, the last one perhaps without; at most one is refused."""
    out = case.generate(Speculative(case.draft_length))
    passes = out.counts.full_passes
    own = len(out.tokens) - sum(out.drafted)
    assert passes - 1 <= own <= passes
    assert 0 <= out.counts.rejected <= own
    assert out.counts.slim_passes == 0


def test_a_perfect_drafter_is_never_refused() -> None:
    for seed in range(4):
        case = dataclasses.replace(lively_case(seed), drafter_kind="itself", count=30)
        out = case.generate(Speculative(4))
        assert out.counts.rejected == 0
        assert out.counts.full_passes == 6
        assert sum(out.drafted) == 24


@given(case=cases(), audit=st.sampled_from(["strict", "tolerant", "off"]))
def test_no_more_tokens_wait_than_are_allowed(case: Case, audit: Audit) -> None:
    method = case.method(audit)
    with torch.inference_mode():
        session = open_session(case.verifier, case.drafter, case.prompt, case.count, Ending(case.eos), GREEDY)
        while not method.finished(session):
            before = session.length, session.decided, session.closed
            finish(method.round(session))
            assert session.pending <= case.max_pending
            assert session.row.exact <= session.row.provisional < session.length
            assert session.decided >= before[1]
            assert before[2] or session.length > before[0] or session.decided > before[1]
    assert session.decided == session.length or audit == "off"


@given(case=cases())
def test_nobody_decides_before_q_where_nothing_may_wait(case: Case) -> None:
    case = dataclasses.replace(case, max_pending=0)
    out = case.generate(case.method("off"))
    assert out.tokens == case.expected
    assert set(out.tiers) == {Tier.ESCALATE}
    assert out.counts.slim_passes == 0


@given(case=cases())
def test_tiers_that_are_off_are_never_asked(case: Case) -> None:
    """Bounds that are never met send every block to q, and the text is q's even without an audit."""
    gates = Gates(slim=constant_gate("slim_margin", 9.0), accept_at=NEVER, regenerate_at=NEVER)
    case = dataclasses.replace(case, gates=gates)
    out = case.generate(case.method("off"))
    assert out.tokens == case.expected
    assert set(out.tiers) == {Tier.ESCALATE}


def test_an_audit_that_is_off_lets_errors_through() -> None:
    """The negative control: without the audit some text is another, so the equality above can fail."""
    diverged = [seed for seed in range(6) if (c := lively_case(seed)).generate(c.method("off")).tokens != c.expected]
    assert diverged


def test_a_loosened_tolerance_lets_errors_through() -> None:
    diverged = [
        seed for seed in range(6) if (c := lively_case(seed)).generate(c.method("tolerant", 0.01)).tokens != c.expected
    ]
    assert diverged


def test_every_path_is_taken() -> None:
    """The lively cases accept, regenerate, escalate, keep pending tokens and take them back: all for q's text."""
    tiers: Counter[Tier] = Counter()
    kept = taken_back = 0
    for seed in range(6):
        case = lively_case(seed)
        method = case.method()
        with torch.inference_mode():
            session = open_session(case.verifier, case.drafter, case.prompt, case.count, Ending(case.eos), GREEDY)
            while not method.finished(session):
                before, passes = session.text[: session.length].tolist(), session.counts.full_passes
                pending = session.pending
                finish(method.round(session))
                if session.counts.full_passes > passes and pending:
                    stands = session.text[: session.length].tolist()[: len(before)] == before
                    kept += stands
                    taken_back += not stands
        out = session.result()
        assert out.tokens == case.expected
        tiers.update(out.tiers)
    assert min(tiers[tier] for tier in Tier) > 0, tiers
    assert kept > 0
    assert taken_back > 0


def test_fewer_full_passes_are_taken() -> None:
    """The tiers do what they are for: tokens that are trusted, rightly, wait for one pass together."""
    sure = constant_gate("slim_margin", 9.0)
    gates = Gates(slim=sure, accept_at=0.9, regenerate_at=0.9)
    for seed in range(4):
        case = dataclasses.replace(lively_case(seed), route=Route(), drafter_kind="itself", gates=gates)
        three, two = case.generate(case.method()), case.generate(Speculative(4))
        assert three.tokens == two.tokens
        assert three.counts.full_passes < two.counts.full_passes < len(two.tokens)


def test_drafted_tokens_end_with_the_text() -> None:
    """An end of text in the middle of a drafted block, for every place in it."""
    for seed in range(2):
        plain = dataclasses.replace(lively_case(seed), drafter_kind="itself")
        for token in set(plain.expected):
            case = dataclasses.replace(plain, eos=frozenset({token}))
            for method in (case.method(), Speculative(6), case.method("off")):
                out = case.generate(method)
                assert out.tokens[-1] == token
                assert out.tokens.count(token) == 1
                if method.audit == "strict":
                    assert out.tokens == case.expected


def test_the_context_may_be_filled_to_its_end() -> None:
    case = lively_case(0)
    context = tiny_config().max_position_embeddings
    case = dataclasses.replace(case, prompt=[3] * (context - 5), count=5)
    assert case.generate(case.method()).tokens == case.expected


METHODS: list[Strategy] = [Autoregressive(), Speculative(3), lively_case(0).method(), lively_case(0).method("off")]


@pytest.mark.parametrize("method", METHODS, ids=["autoregressive", "speculative", "strict", "off"])
def test_logits_that_are_not_finite_are_refused(method: Strategy) -> None:
    broken = RoutedModel(spoil(tiny_model()), Route(attention_skip=[1]))
    decoder = Decoder(broken, make_drafter("near", broken), method)
    with pytest.raises(NumericsError, match="not finite; load it in float32"):
        decoder.generate([3, 4], 8)
    with pytest.raises(NumericsError, match="not finite; load it in float32"):
        list(decoder.stream([3, 4], 8))


@pytest.mark.parametrize("method", METHODS[:3], ids=["autoregressive", "speculative", "strict"])
@pytest.mark.parametrize(
    ("prompt", "count", "complaint"),
    [
        ([], 4, "the prompt is empty"),
        ([3] * 250, 7, "257 positions are asked for.*context holds 256"),
        ([3] * 300, 1, "context holds 256"),
        ([3], 0, "max_new_tokens is 0"),
        ([3], -1, "max_new_tokens is -1"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(method: Strategy, prompt: list[int], count: int, complaint: str) -> None:
    routed = RoutedModel(tiny_model())
    decoder = Decoder(routed, make_drafter("near", routed), method)
    with pytest.raises(PromptError, match=complaint):
        decoder.generate(prompt, count)


@given(case=cases())
def test_a_drafter_may_be_used_again(case: Case) -> None:
    """Nothing of one text is left in the next."""
    decoder = case.decoder(case.method())
    first = decoder.generate(case.prompt, case.count)
    decoder.generate([*case.prompt, 1], 5)
    assert decoder.generate(case.prompt, case.count) == first


@given(case=cases())
def test_a_drafter_of_its_own_opinion_costs_no_token(case: Case) -> None:
    """With the audit off, drafts that nobody trusts do not show: only q's slim choices and q's own do."""
    gates = Gates(slim=constant_gate("slim_margin", 9.0), accept_at=NEVER, regenerate_at=0.5)
    assume(case.max_pending > case.draft_length)
    case = dataclasses.replace(case, gates=gates, route=Route(), head_ids=None)
    assert case.generate(case.method("off")).tokens == case.expected
