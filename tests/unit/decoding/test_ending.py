"""Stop strings, stopping criteria and cancellation: a text ends where it should, in every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList

from tests.cases import METHODS, TOKENIZER, Case, cases, lively_case
from tests.tiny import tiny_model, tiny_tokenizer
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.ending import Ending
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import open_session
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.verification import make_sampler
from viasd_calib.errors import PromptError
from viasd_calib.passes.requests import finish

UNENDING = cases(eos=st.just(frozenset()), family=st.just("llama"))
"""Texts that nothing but what a test asks for brings to an end."""

STOPS = st.lists(st.text("abcd é", min_size=1, max_size=4), min_size=1, max_size=3)


def cut_at(tokens: list[int], holds: Callable[[str], bool]) -> list[int]:
    """Tokens up to the first after which the decoded text holds something."""
    for place in range(1, len(tokens) + 1):
        if holds(str(TOKENIZER.decode(tokens[:place]))):
            return tokens[:place]
    return tokens


@given(case=UNENDING, stops=STOPS)
def test_a_strict_text_ends_where_the_verifiers_own_does(case: Case, stops: list[str]) -> None:
    whole = case.decoder("autoregressive").generate(case.prompt, case.count).tokens
    expected = cut_at(whole, lambda text: any(stop in text for stop in stops))
    for name in ("autoregressive", "speculative", "strict"):
        out = case.decoder(name).generate(case.prompt, case.count, stop_strings=stops)
        assert out.tokens == expected
        assert len(out.tiers) == len(out.drafted) == len(expected)


@given(case=UNENDING, stops=STOPS, name=st.sampled_from(METHODS), temperature=st.sampled_from([0.0, 1.0]))
def test_nothing_follows_a_stop_string(case: Case, stops: list[str], name: str, temperature: float) -> None:
    if name == "strict" and case.gates.convention == "ratio":  # it cannot sample
        temperature = 0.0
    sampling = Sampling(temperature=temperature)
    out = case.decoder(name, sampling).generate(case.prompt, case.count, stop_strings=stops)
    assert out.tokens == cut_at(out.tokens, lambda text: any(stop in text for stop in stops))
    ended = any(stop in str(TOKENIZER.decode(out.tokens)) for stop in stops)
    assert ended or len(out.tokens) == case.count
    assert len(out.tiers) == len(out.drafted) == len(out.tokens)
    streamed = case.decoder(name, sampling).stream(case.prompt, case.count, stop_strings=stops)
    assert [emitted.token for emitted in streamed] == out.tokens


@pytest.mark.parametrize("name", ["speculative", "strict", "off"])
def test_a_stop_string_ends_a_drafted_block_anywhere(name: str) -> None:
    for seed in range(2):
        case = dataclasses.replace(lively_case(seed), drafter_kind="itself")
        whole = case.decoder(name).generate(case.prompt, case.count).tokens
        for token in set(whole):
            stop = str(TOKENIZER.decode([token]))
            if "\N{REPLACEMENT CHARACTER}" in stop:
                continue
            out = case.decoder(name).generate(case.prompt, case.count, stop_strings=stop)
            assert out.tokens == cut_at(whole, lambda text, stop=stop: stop in text)  # type: ignore[misc]


def test_the_prompt_is_no_part_of_a_stop_string() -> None:
    case = lively_case(0)
    whole = case.decoder("strict").generate(case.prompt, case.count).tokens
    prompt = [*case.prompt, *whole[:3]]
    overlapping = str(TOKENIZER.decode(whole[2:4]))
    rest = case.decoder("autoregressive").generate(prompt, 8).tokens
    out = case.decoder("strict").generate(prompt, 8, stop_strings=[overlapping])
    assert out.tokens == cut_at(rest, lambda text: overlapping in text) != rest[:1]


class SumDivides(StoppingCriteria):
    """Ends a text, prompt included, whose ids add up to a multiple of a number."""

    stateless = True

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.sum(-1) % self.number == 0


@given(case=UNENDING, number=st.integers(2, 30))
def test_criteria_end_a_text_as_in_transformers(case: Case, number: int) -> None:
    ids = torch.tensor([case.prompt])
    model: Any = tiny_model(case.seed)
    criteria = StoppingCriteriaList([SumDivides(number)])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=case.count,
        stopping_criteria=criteria,
        pad_token_id=0,
    )[0, len(case.prompt) :].tolist()
    for name in ("autoregressive", "speculative", "strict"):
        assert case.decoder(name).generate(case.prompt, case.count, criteria=criteria).tokens == expected


def test_an_end_that_is_taken_back_is_none() -> None:
    """A pending token ended the text, the audit refused it, and the text went on to q's own end."""
    taken_back = 0
    for seed in range(12):
        case = lively_case(seed)
        decoder, method = case.decoder("strict"), case.named("strict")
        ending = Ending(frozenset({1}), StoppingCriteriaList([SumDivides(7)]))
        with torch.inference_mode():
            session = open_session(
                decoder.verifier, decoder.drafter, case.prompt, case.count, ending, make_sampler(Sampling())
            )
            while not method.finished(session):
                ended = session.ended
                finish(method.round(session))
                taken_back += ended and not session.ended
        own = Decoder(decoder.verifier, None, Autoregressive(), frozenset({1}))
        expected = own.generate(case.prompt, case.count, criteria=[SumDivides(7)])
        assert session.result().tokens == expected.tokens
    assert taken_back > 0


def test_end_of_text_tokens_need_no_criteria() -> None:
    asked: list[int] = []

    class Watcher(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            asked.append(input_ids.shape[1])
            return torch.tensor([False])

    ending = Ending(frozenset({2}), StoppingCriteriaList([Watcher()]))
    assert ending.within(torch.tensor([9, 9, 1, 2, 3]), [1, 2, 3]) == 2
    assert asked == [3, 4]  # nothing after the end is shown
    assert Ending(frozenset({2})).within(torch.tensor([1]), [1]) is None


def test_stop_strings_that_cannot_be_looked_for_are_refused() -> None:
    case = lively_case(0)
    decoder = case.decoder("strict")
    with pytest.raises(PromptError, match="a stop string is empty"):
        decoder.generate(case.prompt, 4, stop_strings=["a", ""])
    with pytest.raises(PromptError, match=r"cannot write the stop strings \['xyz'\]: none of its tokens ends one"):
        decoder.generate(case.prompt, 4, stop_strings="xyz")
    decoder.tokenizer = tiny_tokenizer()  # its words come back as others
    with pytest.raises(PromptError, match=r"\['w1'\]: what its tokens write cannot be told"):
        decoder.generate(case.prompt, 4, stop_strings="w1")
    decoder.tokenizer = None
    with pytest.raises(PromptError, match="need a tokenizer"):
        list(decoder.stream(case.prompt, 4, stop_strings="a"))


@given(case=UNENDING, name=st.sampled_from(METHODS), told=st.integers(0, 8))
def test_a_closed_stream_leaves_the_decoder_as_new(case: Case, name: str, told: int) -> None:
    fresh = case.decoder(name).generate(case.prompt, case.count)
    decoder = case.decoder(name)
    stream: Any = decoder.stream([*case.prompt, 1], 16)
    for _ in range(told):
        next(stream)
    stream.close()
    assert decoder.generate(case.prompt, case.count) == fresh


@given(case=UNENDING, name=st.sampled_from(METHODS), rounds=st.integers(0, 6))
def test_a_cancelled_text_is_what_is_final(case: Case, name: str, rounds: int) -> None:
    fresh = case.decoder(name).generate(case.prompt, case.count)
    decoder = case.decoder(name)
    asked = iter(range(100))
    out = decoder.generate(case.prompt, case.count, cancelled=lambda: next(asked) == rounds)
    assert out.tokens == fresh.tokens[: len(out.tokens)]
    assert len(out.tiers) == len(out.drafted) == len(out.tokens)
    assert rounds > 0 or out.tokens == []
    assert decoder.generate(case.prompt, case.count) == fresh


@pytest.mark.parametrize("name", METHODS)
def test_an_event_cancels_a_stream(name: str) -> None:
    case = lively_case(1)
    fresh = case.decoder(name).generate(case.prompt, case.count)
    decoder, event = case.decoder(name), Event()
    tokens: list[int] = []
    for emitted in decoder.stream(case.prompt, case.count, cancelled=event):
        tokens.append(emitted.token)
        event.set()
    assert 0 < len(tokens) < case.count
    assert tokens == fresh.tokens[: len(tokens)]
    assert decoder.generate(case.prompt, case.count) == fresh
    assert decoder.generate(case.prompt, case.count, cancelled=event).tokens == []
