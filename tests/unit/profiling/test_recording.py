from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tiny import DRAFTERS, constant_gate, make_drafter
from viasd_calib.choices import StrategyName
from viasd_calib.decoding.engine import Engine
from viasd_calib.decoding.verification import GreedySampler
from viasd_calib.models import Verifier
from viasd_calib.profiling import recording
from viasd_calib.profiling.recording import RecordedRound, RecordedText, Recorder, Span, typical_round
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Gates, PromptLookupDraft, Route, RoutingSpec

PROMPT = [3, 7, 5, 3, 7]


def engine_of(verifier: Verifier, kind: str = "near", head_ids: torch.Tensor | None = None) -> Engine:
    """Gates that let every tier have its say now and then."""
    lively = constant_gate("slim_margin", 0.0).model_copy(update={"weight": [1.0]})
    spec = RoutingSpec(
        verifier=verifier.ref,
        draft=PromptLookupDraft(),
        route=Route(attention_skip=[2]),
        gates=Gates(slim=lively, accept_at=0.55, regenerate_at=0.55),
    )
    routed = RoutedModel(verifier.model, spec.route, held={"head_vocab": head_ids})
    return Engine(spec, verifier, routed, make_drafter(kind, routed))


class Clock:
    """Stands for the module ``time``; moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.now += seconds
            return call(*arguments)

        return run


def counted(rounds: list[RecordedRound], call: str) -> int:
    return sum(span.call == call and span.width > 0 for one in rounds for span in one.spans if span.tier != "draft")


def test_a_reduced_head_is_recorded_as_a_head(tiny_verifier: Verifier) -> None:
    engine = engine_of(tiny_verifier, head_ids=torch.arange(0, 24, 2))
    rounds = RecordedText(engine, "three_tier", PROMPT, 20).finish().rounds
    calls = Counter(span.call for one in rounds for span in one.spans if span.tier in ("slim", "head"))
    assert calls["slim_logits"] == calls["slim"] > 0


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("name", ["autoregressive", "speculative", "three_tier"])
def test_every_pass_is_recorded_and_the_text_is_the_same(
    tiny_verifier: Verifier, name: StrategyName, kind: str
) -> None:
    engine = engine_of(tiny_verifier, kind)
    plain = engine.decoder(name).generate(PROMPT, 20)
    recorded = RecordedText(engine, name, PROMPT, 20).finish()
    assert recorded.tokens == len(plain.tokens)
    assert counted(recorded.rounds, "full") == plain.counts.full_passes
    assert counted(recorded.rounds, "slim") == plain.counts.slim_passes
    drafted = [span for one in recorded.rounds for span in one.spans if span.tier == "draft"]
    assert bool(drafted) == (name != "autoregressive")
    if kind not in ("lookup", "random"):
        assert sum(span.width > 0 for span in drafted) == plain.counts.draft_steps
    heads = Counter(span.tier for one in recorded.rounds for span in one.spans)["head"]
    assert heads == plain.counts.full_passes + plain.counts.slim_passes


@pytest.mark.parametrize("kind", ["lookup+shallow", "lookup+near"])
def test_searches_are_draft_time_and_no_steps(tiny_verifier: Verifier, kind: str) -> None:
    rounds = RecordedText(engine_of(tiny_verifier, kind), "speculative", PROMPT, 20, may_end=False).finish().rounds
    calls = [[span.call for span in one.spans if span.tier == "draft"] for one in rounds]
    assert all(of_round[0] == "look_up" and of_round.count("look_up") == 1 for of_round in calls)
    modelled = [bool({"step", "full"}.intersection(of_round)) for of_round in calls]
    assert not modelled[0]  # the prompt comes back to its beginning
    assert any(modelled)


@pytest.mark.parametrize("name", ["autoregressive", "speculative", "three_tier"])
def test_spans_and_gaps_fill_a_round(tiny_verifier: Verifier, name: StrategyName) -> None:
    for one in RecordedText(engine_of(tiny_verifier, "shallow"), name, PROMPT, 20).finish().rounds:
        edges = [0.0, *(edge for span in one.spans for edge in (span.begin, span.end)), one.seconds]
        assert edges == sorted(edges)
        assert one.spans
        assert sum(end - begin for begin, end in one.gaps()) == pytest.approx(one.rest)
        assert 0 < one.rest < one.seconds


def test_the_prompts_own_pass_is_in_no_round(tiny_verifier: Verifier) -> None:
    rounds = RecordedText(engine_of(tiny_verifier), "autoregressive", PROMPT, 4, may_end=False).finish().rounds
    assert [span.width for one in rounds for span in one.spans if span.call == "full"] == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", DRAFTERS)
def test_the_engine_given_stays_as_it_is(tiny_verifier: Verifier, kind: str) -> None:
    engine = engine_of(tiny_verifier, kind)
    before = dict(vars(engine.routed)), dict(vars(engine.drafter)), set(vars(getattr(engine.drafter, "model", engine)))
    watched = Recorder(torch.device("cpu")).engine(engine)
    assert vars(watched.routed).keys() - before[0].keys() == {"full", "slim", "logits", "slim_logits"}
    assert vars(engine.routed) == before[0]
    assert vars(engine.drafter) == before[1]
    assert set(vars(getattr(engine.drafter, "model", engine))) == before[2]


def test_what_is_no_pass_is_the_rest(tiny_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that a pass of q moves by 30 seconds and q's choice by 5, and nothing else."""
    engine = engine_of(tiny_verifier)
    clock = Clock()
    monkeypatch.setattr(recording, "time", clock)
    monkeypatch.setattr(engine.routed, "_forward", clock.taking(30.0, engine.routed._forward))
    monkeypatch.setattr(GreedySampler, "scores", clock.taking(5.0, GreedySampler.scores))
    rounds = RecordedText(engine, "autoregressive", PROMPT, 3, may_end=False).finish().rounds
    assert [(one.seconds, one.rest) for one in rounds] == [(35.0, 5.0)] * 3
    assert rounds[1].spans[0] == Span("full", "full", 0.0, 30.0, 1)
    assert rounds[1].gaps() == [(30.0, 35.0)]


def test_a_text_may_go_on_behind_its_end(tiny_verifier: Verifier) -> None:
    engine = engine_of(tiny_verifier)
    ends = next(
        prompt
        for prompt in ([first, second] for first in range(24) for second in range(24))
        if RecordedText(engine, "autoregressive", prompt, 12).finish().tokens < 12
    )
    assert RecordedText(engine, "autoregressive", ends, 12, may_end=False).finish().tokens == 12


def a_round(seconds: float, tiers: tuple[str, ...]) -> RecordedRound:
    spans = tuple(Span(tier, tier, place * 0.001, (place + 1) * 0.001, 1) for place, tier in enumerate(tiers))  # type: ignore[arg-type]
    return RecordedRound(spans, seconds)


def test_the_typical_round_is_the_median_of_the_commonest_shape() -> None:
    common = [a_round(seconds, ("draft", "full")) for seconds in (0.009, 0.004, 0.005)]
    rounds = [a_round(0.1, ("full",)), *common, a_round(0.2, ("draft", "draft", "full"))]
    typical = typical_round(rounds)
    assert typical.recorded is common[2]
    assert (typical.alike, typical.rounds) == (3, 5)
    assert typical.rest_share == pytest.approx((0.318 - 0.010) / 0.318)
