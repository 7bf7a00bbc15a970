"""Processors and criteria under speculation: what may run is a function of its arguments, or is led along the text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, MinLengthLogitsProcessor, StoppingCriteria
from transformers.generation import logits_process, stopping_criteria

from tests.cases import METHODS, TOKENIZER, Case, lively_case
from tests.strategies import token_lists
from tests.tiny import VOCAB, constant_gate, save_tiny
from viasd_calib.choices import StrategyName
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.engine import Engine, assemble
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.stateless import CALLS_BACK, STATEFUL, STATELESS, RollsBack, TextFollower, read_criteria
from viasd_calib.errors import SamplingError
from viasd_calib.models import load_verifier
from viasd_calib.spec import Gates, PromptLookupDraft, Route, RoutingSpec

PROMPT = [5, 6, 7, 5, 6]


def classes_of(module: Any, base: type) -> dict[str, type]:
    """Every class that transformers defines in one of its modules."""
    found = inspect.getmembers(module, lambda one: inspect.isclass(one) and issubclass(one, base) and one is not base)
    return {name: one for name, one in found if one.__module__ == module.__name__}


PROCESSORS = classes_of(logits_process, LogitsProcessor)
CRITERIA = classes_of(stopping_criteria, StoppingCriteria)


def test_every_class_of_transformers_is_known() -> None:
    """A release that adds a class makes this fail: look at it, and put it where it belongs."""
    known = STATELESS | STATEFUL.keys() | CALLS_BACK.keys()
    assert {*PROCESSORS, *CRITERIA} <= known
    assert not STATELESS & STATEFUL.keys()
    assert len(PROCESSORS) > 25
    assert len(CRITERIA) > 3


MADE: dict[str, Callable[[], Any]] = {
    "AlternatingCodebooksLogitsProcessor": lambda: logits_process.AlternatingCodebooksLogitsProcessor(2, 8, 8),
    "BarkEosPrioritizerLogitsProcessor": lambda: logits_process.BarkEosPrioritizerLogitsProcessor(2, 0.1),
    "ClassifierFreeGuidanceLogitsProcessor": lambda: logits_process.ClassifierFreeGuidanceLogitsProcessor(2.0),
    "DiaClassifierFreeGuidanceLogitsProcessor": lambda: logits_process.DiaClassifierFreeGuidanceLogitsProcessor(2.0),
    "DiaEOSChannelFilterLogitsProcessor": lambda: logits_process.DiaEOSChannelFilterLogitsProcessor(1, 2),
    "EncoderNoRepeatNGramLogitsProcessor": lambda: logits_process.EncoderNoRepeatNGramLogitsProcessor(
        2, torch.tensor([[3, 4, 5]])
    ),
    "EncoderRepetitionPenaltyLogitsProcessor": lambda: logits_process.EncoderRepetitionPenaltyLogitsProcessor(
        2.0, torch.tensor([[3, 4, 5]])
    ),
    "EpsilonLogitsWarper": lambda: logits_process.EpsilonLogitsWarper(0.1),
    "EtaLogitsWarper": lambda: logits_process.EtaLogitsWarper(0.1),
    "ExponentialDecayLengthPenalty": lambda: logits_process.ExponentialDecayLengthPenalty((1, 1.5), 2, 2),
    "ForcedBOSTokenLogitsProcessor": lambda: logits_process.ForcedBOSTokenLogitsProcessor(3),
    "ForcedEOSTokenLogitsProcessor": lambda: logits_process.ForcedEOSTokenLogitsProcessor(6, 2),
    "InfNanRemoveLogitsProcessor": logits_process.InfNanRemoveLogitsProcessor,
    "LogitNormalization": logits_process.LogitNormalization,
    "MinLengthLogitsProcessor": lambda: logits_process.MinLengthLogitsProcessor(5, 2),
    "MinNewTokensLengthLogitsProcessor": lambda: logits_process.MinNewTokensLengthLogitsProcessor(2, 3, 2),
    "MinPLogitsWarper": lambda: logits_process.MinPLogitsWarper(0.1),
    "NoBadWordsLogitsProcessor": lambda: logits_process.NoBadWordsLogitsProcessor([[3], [4, 5]], 2),
    "NoRepeatNGramLogitsProcessor": lambda: logits_process.NoRepeatNGramLogitsProcessor(2),
    "RepetitionPenaltyLogitsProcessor": lambda: logits_process.RepetitionPenaltyLogitsProcessor(1.4),
    "SequenceBiasLogitsProcessor": lambda: logits_process.SequenceBiasLogitsProcessor({(3,): 2.0, (4, 5): -3.0}),
    "SuppressTokensAtBeginLogitsProcessor": lambda: logits_process.SuppressTokensAtBeginLogitsProcessor([3, 4], 3),
    "SuppressTokensLogitsProcessor": lambda: logits_process.SuppressTokensLogitsProcessor([3, 4]),
    "TemperatureLogitsWarper": lambda: logits_process.TemperatureLogitsWarper(0.7),
    "TopHLogitsWarper": lambda: logits_process.TopHLogitsWarper(0.5),
    "TopKLogitsWarper": lambda: logits_process.TopKLogitsWarper(4),
    "TopPLogitsWarper": lambda: logits_process.TopPLogitsWarper(0.5),
    "TypicalLogitsWarper": lambda: logits_process.TypicalLogitsWarper(0.5),
    "WatermarkLogitsProcessor": lambda: logits_process.WatermarkLogitsProcessor(VOCAB, "cpu", context_width=1),
    "WhisperTimeStampLogitsProcessor": lambda: logits_process.WhisperTimeStampLogitsProcessor(
        type("Config", (), {"no_timestamps_token_id": 9, "eos_token_id": 2, "bos_token_id": 1,
                            "max_initial_timestamp_index": 3})(), begin_index=2
    ),
    "EosTokenCriteria": lambda: stopping_criteria.EosTokenCriteria([3, 4]),
    "MaxLengthCriteria": lambda: stopping_criteria.MaxLengthCriteria(5),
    "MaxTimeCriteria": lambda: stopping_criteria.MaxTimeCriteria(1e9),
    "StopStringCriteria": lambda: stopping_criteria.StopStringCriteria(TOKENIZER, ["ab"]),
}  # fmt: skip
DOUBLED = ("ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor")
"""They want scores with and without a condition; the decoder gives them one row, which they refuse themselves."""


def test_every_stateless_class_is_tried() -> None:
    assert set(MADE) == STATELESS & {*PROCESSORS, *CRITERIA}


@pytest.mark.parametrize("name", sorted(MADE))
@settings(max_examples=5)
@given(texts=st.lists(token_lists(2, 8), min_size=2, max_size=3), seed=st.integers(0, 9))
def test_a_stateless_class_answers_alike_whatever_it_was_asked_before(
    name: str, texts: list[list[int]], seed: int
) -> None:
    used = MADE[name]()

    def answer(one: Any, text: list[int]) -> Any:
        rows = 2 if name in DOUBLED else 1
        scores = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed + sum(text)))
        return one(torch.tensor([text]), scores)

    for text in [*texts, *reversed(texts)]:
        assert torch.equal(answer(used, text), answer(MADE[name](), text))


class Cycle(LogitsProcessor):
    """Allows {10..15} and {16..21} in turn; counts its calls instead of looking at the text."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        allowed = slice(10, 16) if self.calls % 2 == 0 else slice(16, 22)
        self.calls += 1
        only = torch.full_like(scores, -torch.inf)
        only[:, allowed] = scores[:, allowed]
        return only


class Grammar(Cycle):
    """The same, which can go back: it notes after which call it had seen how much."""

    def __init__(self) -> None:
        super().__init__()
        self.first = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.calls == 0:
            self.first = input_ids.shape[1]
        assert input_ids.shape[1] == self.first + self.calls, "shown one token a call"
        return super().__call__(input_ids, scores)

    def rollback(self, length: int) -> None:
        assert length == 0 or self.first <= length <= self.first + self.calls - 1
        self.calls = 0 if length == 0 else length - self.first + 1


class Countdown(StoppingCriteria):
    """Ends a text at its fifth token; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return torch.tensor([self.calls >= 5])


class CountdownBack(Countdown):
    """The same, which can go back."""

    first = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.calls == 0:
            self.first = input_ids.shape[1]
        return super().__call__(input_ids, scores)

    def rollback(self, length: int) -> None:
        self.calls = 0 if length == 0 else length - self.first + 1


@pytest.fixture(scope="module")
def grammar_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A spec that has every gate, and trusts easily."""
    folder = tmp_path_factory.mktemp("grammar")
    verifier = load_verifier(str(save_tiny(folder / "verifier", eos=None)))
    gate = constant_gate("draft_depth", 1.0)
    spec = RoutingSpec(
        verifier=verifier.ref,
        draft=PromptLookupDraft(),
        route=Route(attention_skip=[1]),
        gates=Gates(draft=gate, draft_accept_at=0.5, convention="ratio", accept_at=0.1, escalate_below=0.05),
    )
    return assemble(spec, folder, verifier)


def obeys(tokens: list[int]) -> bool:
    return all((token in range(10, 16)) == (place % 2 == 0) for place, token in enumerate(tokens))


def decoder_of(case: Case, method: str, processor: Any, temperature: float = 0.0, **settings: Any) -> Decoder:
    sampling = Sampling(temperature=temperature, seed=3)
    return Decoder(case.verifier, case.drafter, case.named(method), case.eos, sampling, [processor], **settings)


@pytest.mark.parametrize("method", METHODS)
def test_what_may_remember_is_refused(method: str) -> None:
    complaint = (
        r"^processors\[0\], a Cycle, may remember earlier calls, and speculation takes tokens back and asks again; "
        r"where its answer follows from text and scores alone, say so with its attribute stateless = True or with "
        r"assume_stateless=True, else give it a method rollback\(length\)$"
    )
    with pytest.raises(SamplingError, match=complaint):
        decoder_of(lively_case(0), method, Cycle())


def test_a_subclass_may_remember_what_its_parent_does_not() -> None:
    class Longer(MinLengthLogitsProcessor):
        pass

    with pytest.raises(SamplingError, match=r"a Longer, may remember"):
        decoder_of(lively_case(0), "strict", Longer(3, 2))


def test_a_function_of_the_users_is_what_it_is() -> None:
    constrained = logits_process.PrefixConstrainedLogitsProcessor(lambda _batch, _ids: [3, 4], 1)
    with pytest.raises(SamplingError, match="PrefixConstrainedLogitsProcessor, calls a function of yours"):
        decoder_of(lively_case(0), "strict", constrained)
    decoder = decoder_of(lively_case(0), "strict", constrained, assume_stateless=True)
    assert set(decoder.generate(PROMPT, 8).tokens) <= {3, 4}


@pytest.mark.parametrize("vouched", [False, True])
def test_no_word_makes_a_stateful_class_run(vouched: bool) -> None:
    guided = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, lively_case(0).model)
    with pytest.raises(SamplingError, match=r"remembers earlier calls; .* so it is not supported: leave it out"):
        decoder_of(lively_case(0), "strict", guided, assume_stateless=vouched)
    confident = stopping_criteria.ConfidenceCriteria(0.5)
    with pytest.raises(SamplingError, match=r"criteria\[0\], a ConfidenceCriteria, needs scores"):
        read_criteria([confident], vouched)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (3, r"^processors is 3 \(int\); give a list of logits processors"),
        ([3], r"^processors\[0\] is 3 \(int\), which cannot be called"),
        (Grammar(), "^processors is a value of type Grammar; give a list"),
        ([lambda ids, scores: scores], r"^processors\[0\], a function, may remember"),
    ],
)
def test_what_is_no_list_of_processors_is_refused(given: Any, complaint: str) -> None:
    case = lively_case(0)
    with pytest.raises(SamplingError, match=complaint):
        Decoder(case.verifier, case.drafter, case.named("strict"), processors=given)


@pytest.mark.parametrize("sampling", [0.7, "greedy", {"temperature": 0.7}])
def test_what_is_no_sampling_is_refused(sampling: Any) -> None:
    case = lively_case(0)
    with pytest.raises(SamplingError, match=r"^sampling is .*; give a Sampling, as Sampling\(temperature=0\.8\)"):
        Decoder(case.verifier, case.drafter, case.named("strict"), sampling=sampling)


def test_a_word_is_taken() -> None:
    """By an option, or by the processor's own attribute."""
    case = lively_case(0)
    decoder_of(case, "strict", Cycle(), assume_stateless=True).generate(PROMPT, 4)
    sworn = Cycle()
    sworn.stateless = True  # type: ignore[attr-defined]
    decoder_of(case, "strict", sworn).generate(PROMPT, 4)
    decoder_of(case, "strict", lambda ids, scores: scores, assume_stateless=True).generate(PROMPT, 4)


LOSSLESS = ("autoregressive", "speculative", "strict")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", ["lookup", "near", "shallow", "random", "lookup+near"])
def test_what_rolls_back_keeps_its_grammar(method: str, temperature: float, drafter: str) -> None:
    case = dataclasses.replace(lively_case(1), drafter_kind=drafter)
    text = decoder_of(case, method, Grammar(), temperature).generate(PROMPT, 20).tokens
    assert obeys(text)
    if temperature == 0 and method in LOSSLESS:
        assert text == decoder_of(case, "autoregressive", Grammar()).generate(PROMPT, 20).tokens


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drafter", ["lookup", "near", "lookup+shallow"])
def test_what_rolls_back_keeps_its_grammar_in_a_batch(method: str, drafter: str) -> None:
    case = dataclasses.replace(lively_case(1), drafter_kind=drafter)
    decoder = decoder_of(case, method, Grammar())
    texts = [one.tokens for one in decoder.generate_batch([PROMPT, [3, 4], PROMPT], 8)]
    assert all(obeys(text) for text in texts)
    if method in LOSSLESS:
        assert texts[0] == texts[2] == decoder.generate(PROMPT, 8).tokens


@pytest.mark.parametrize("name", get_args(StrategyName))
def test_every_method_keeps_a_grammar(name: StrategyName, grammar_engine: Engine) -> None:
    for prompt in (PROMPT, [3, 4, 3], [9]):
        decoder = grammar_engine.decoder(name, audit="off", processors=[Grammar()])
        assert obeys(decoder.generate(prompt, 12).tokens)


def test_texts_and_decoders_may_share_what_rolls_back() -> None:
    """Streams read in turn, a prompt that goes on from the text before, and another decoder in between."""
    case, grammar = lively_case(0), Grammar()
    decoder = decoder_of(case, "strict", grammar)
    first = decoder.generate(PROMPT, 12).tokens
    assert obeys(decoder.generate(PROMPT + first, 12).tokens)
    assert obeys(decoder_of(case, "speculative", grammar).generate(PROMPT + first[:3], 12).tokens)
    assert decoder.generate(PROMPT, 12).tokens == first
    streams = [decoder_of(case, "strict", grammar).stream(PROMPT, 12) for _ in range(3)]
    texts = [[emitted.token for emitted in turn] for turn in zip(*zip(*streams, strict=True), strict=True)]
    assert texts == [first] * 3


def test_what_failed_begins_anew() -> None:
    class Failing(Grammar):
        fails = True

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if self.fails and self.calls == 3:
                raise RuntimeError("the grammar failed")
            return super().__call__(input_ids, scores)

    failing = Failing()
    decoder = decoder_of(lively_case(0), "strict", failing)
    with pytest.raises(RuntimeError, match="the grammar failed"):
        decoder.generate(PROMPT, 12)
    failing.fails = False
    assert obeys(decoder.generate(PROMPT, 12).tokens)


def test_leading_ends_with_what_is_led() -> None:
    from viasd_calib.decoding import stateless

    grammar = Grammar()
    led, key = TextFollower(grammar, 2), id(grammar)
    assert isinstance(grammar, RollsBack)
    assert key in stateless._LAST_CALLS
    del led, grammar
    assert key not in stateless._LAST_CALLS


@pytest.mark.parametrize("method", METHODS)
def test_criteria_are_held_to_the_same(method: str) -> None:
    decoder = lively_case(0).decoder(method)
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(SamplingError, match=r"criteria\[0\], a Countdown, may remember earlier calls"):
            call(PROMPT, 12, criteria=[Countdown()])
    with pytest.raises(SamplingError, match=r"criteria is a value of type MaxLengthCriteria; give a list"):
        decoder.generate(PROMPT, 12, criteria=stopping_criteria.MaxLengthCriteria(9))  # type: ignore[arg-type]
    assert len(decoder.generate(PROMPT, 12, criteria=[CountdownBack()]).tokens) == 5
    texts = decoder.generate_batch([PROMPT, [3], PROMPT], 12, criteria=[CountdownBack()])
    assert [len(text.tokens) for text in texts] == [5] * 3
