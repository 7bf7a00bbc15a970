"""Texts that are decoded together: each is the one that it is alone, and they share what they wait for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import token_lists
from tests.tiny import DRAFTERS, VOCAB, constant_gate, letter_tokenizer, make_drafter, spoil, tiny_model
from tests.unit.decoding.test_ending import SumDivides
from tests.unit.decoding.test_rounds import Case, cases, lively_case
from viasd_calib.decoding.acceptance import Tier
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.gates import Gate
from viasd_calib.decoding.sampling import Sampling, seed_of_text
from viasd_calib.decoding.session import Generation
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.lenient import Lenient
from viasd_calib.decoding.strategies.multi_level import MultiLevel
from viasd_calib.decoding.strategies.prompt_lookup import PromptLookupDecoding
from viasd_calib.decoding.strategies.self_speculative import SelfSpeculative
from viasd_calib.decoding.strategies.slim_only import SlimOnly
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.speculative_fixed import SpeculativeFixed
from viasd_calib.decoding.strategies.sprinter import Sprinter
from viasd_calib.decoding.strategies.static_ensemble import StaticEnsemble
from viasd_calib.decoding.strategies.trispec import TriSpec
from viasd_calib.decoding.strategies.via_sd_fixed import ViaSDFixed
from viasd_calib.decoding.strategies.via_sd_published import ViaSDPublished
from viasd_calib.draft.causal import DraftPass
from viasd_calib.draft.shallow import ShallowStep
from viasd_calib.errors import NumericsError, PromptError
from viasd_calib.passes.model_passes import ModelPass
from viasd_calib.passes.requests import Cost, Passes, Read, Request
from viasd_calib.passes.scheduling import run_together
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.spec import Route

GREEDY = Sampling()
METHODS = ("autoregressive", "speculative", "gated", "strict", "tolerant", "off")
LOSSY_IN_SAMPLING = ("via_sd_fixed", "via_sd_published", "trispec")
GATE = Gate(constant_gate("draft_margin", 0.0).model_copy(update={"weight": [1.0]}))
BASELINES: dict[str, Strategy] = {
    "speculative_fixed": SpeculativeFixed(3),
    "self_speculative": SelfSpeculative(3),
    "prompt_lookup": PromptLookupDecoding(3),
    "multi_level": MultiLevel(draft_length=3, max_pending=8),
    "slim_only": SlimOnly(),
    "lenient": Lenient(3),
    "static_ensemble": StaticEnsemble(3, GATE, 0.6),
    "trispec": TriSpec(draft_length=3, max_pending=8),
    "sprinter": Sprinter(draft_gate=GATE, draft_accept_at=0.7, draft_length=3, max_pending=8),
    "via_sd_fixed": ViaSDFixed(draft_length=3, max_pending=8),
    "via_sd_published": ViaSDPublished(draft_length=3, max_pending=8),
}


def method_of(case: Case, name: str) -> Strategy:
    """A method by name, with the case's gates where it has some."""
    if name in BASELINES:
        return BASELINES[name]
    if name == "autoregressive":
        return Autoregressive()
    if name in ("speculative", "gated"):
        gate = Gate(case.gates.draft) if case.gates.draft is not None and name == "gated" else None
        return Speculative(case.draft_length, gate, case.gates.draft_stop_below)
    return case.method(name)  # type: ignore[arg-type]


def alone(
    case: Case, method: Strategy, sampling: Sampling, prompts: Sequence[list[int]], **end: Any
) -> list[Generation]:
    """Every text by itself, from a new decoder."""
    return [
        case.decoder(method, replace(sampling, seed=seed_of_text(sampling.seed, number))).generate(
            prompt, case.count, **end
        )
        for number, prompt in enumerate(prompts)
    ]


PROMPTS = st.lists(token_lists(1, 9), min_size=2, max_size=5)


@settings(max_examples=20)
@given(case=cases(), prompts=PROMPTS, name=st.sampled_from(METHODS), size=st.integers(2, 5))
def test_a_row_is_the_text_that_it_is_alone(case: Case, prompts: list[list[int]], name: str, size: int) -> None:
    """Tokens, tiers, drafted flags and counts, in any family, with any drafter, gates and route."""
    method = method_of(case, name)
    together = case.decoder(method).generate_batch(prompts, case.count, batch_size=size)
    assert together == alone(case, method, GREEDY, prompts)


@settings(max_examples=12)
@given(
    case=cases(),
    prompts=PROMPTS,
    name=st.sampled_from(METHODS),
    size=st.integers(2, 5),
    seed=st.integers(-3, 2**63 - 1),
)
def test_a_sampled_row_is_the_text_that_is_drawn_alone(
    case: Case, prompts: list[list[int]], name: str, size: int, seed: int
) -> None:
    assume(name != "strict" or case.gates.convention == "calibrated")  # the other looks at what was drawn
    method, sampling = method_of(case, name), Sampling(temperature=1.2, top_p=0.9, repetition_penalty=1.1, seed=seed)
    together = case.decoder(method, sampling).generate_batch(prompts, case.count, batch_size=size)
    assert together == alone(case, method, sampling, prompts)


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=4)
@given(case=cases(), prompts=PROMPTS, temperature=st.sampled_from([0.0, 1.0]))
def test_a_baselines_row_is_the_text_that_it_is_alone(
    name: str, case: Case, prompts: list[list[int]], temperature: float
) -> None:
    method, sampling = BASELINES[name], Sampling(temperature=temperature, seed=5)
    together = case.decoder(method, sampling).generate_batch(prompts, case.count)
    assert together == alone(case, method, sampling, prompts)


LIVELY_PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8], [9, 7], [11, 12, 13, 14, 15]]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_tier_decides_in_a_batch(family: str, drafter: str) -> None:
    """The lively cases: long texts, rows at different points of their rounds, pending tokens taken back."""
    case = replace(lively_case(2), family=family, drafter_kind=drafter, count=24)
    together = case.decoder(case.method()).generate_batch(LIVELY_PROMPTS, case.count)
    assert together == alone(case, case.method(), GREEDY, LIVELY_PROMPTS)
    if drafter == "near":
        assert Counter(tier for text in together for tier in text.tiers).keys() == set(Tier)
        assert len({text.counts.full_passes for text in together}) > 1  # they go at paces of their own


@given(case=cases(), prompts=PROMPTS, seed=st.integers(0, 9))
def test_the_batch_size_changes_no_text(case: Case, prompts: list[list[int]], seed: int) -> None:
    decoder = case.decoder(Speculative(3), Sampling(temperature=1.0, seed=seed))
    first, *others = [decoder.generate_batch(prompts, 8, batch_size=size) for size in (1, 2, 3, 8)]
    assert all(other == first for other in others)


def test_equal_prompts_are_drawn_apart() -> None:
    case, sampling = replace(lively_case(0), count=16), Sampling(temperature=1.0)
    texts = case.decoder(case.method(), sampling).generate_batch([[3, 4]] * 4, case.count)
    assert len({tuple(text.tokens) for text in texts}) == 4
    assert texts == alone(case, case.method(), sampling, [[3, 4]] * 4)


def test_seeds_of_texts_lie_apart() -> None:
    seeds = {seed_of_text(seed, number) for seed in range(50) for number in range(50)}
    assert len(seeds) == 2500
    assert [seed_of_text(seed, 0) for seed in (-3, 0, 7)] == [-3, 0, 7]


@dataclass
class Forward:
    """One forward that was run."""

    ids: Tensor
    window: CacheWindow


class Watched(RoutedModel):
    """A verifier that notes its forwards."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: dict[str, list[Forward]] = {"full": [], "slim": []}

    def full(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        self.seen["full"].append(Forward(ids, window))
        return super().full(ids, window, taps)

    def slim(self, ids: Tensor, window: CacheWindow, taps: Sequence[int] = ()) -> States:
        self.seen["slim"].append(Forward(ids, window))
        return super().slim(ids, window, taps)


def watched(case: Case, method: Strategy) -> tuple[Decoder, Watched]:
    verifier = Watched(case.model, case.route, case.slim_parts)
    return Decoder(verifier, make_drafter(case.drafter_kind, verifier, case.seed), method, case.eos), verifier


def uneven_case() -> tuple[Case, list[int]]:
    """A case whose texts end after very different numbers of tokens, and those numbers."""
    for token in range(VOCAB):
        case = lively_case(2, frozenset({token}))
        lengths = [len(text.tokens) for text in alone(case, Autoregressive(), GREEDY, LIVELY_PROMPTS)]
        if len(set(lengths)) >= 3:
            return case, lengths
    raise AssertionError("no token ends these texts at different places")


def test_a_finished_row_is_in_no_later_forward() -> None:
    """One token a pass: every forward holds just the texts that are not finished, and so does the cache."""
    case, lengths = uneven_case()
    decoder, verifier = watched(case, Autoregressive())
    decoder.generate_batch(LIVELY_PROMPTS, case.count)
    prompts, *steps = verifier.seen["full"]
    assert prompts.ids.shape == (4, 7)  # a prompt of one token has nothing to read
    live = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert [forward.ids.shape[0] for forward in steps] == live
    assert live[0] == 5 > live[-1]


@pytest.mark.parametrize("name", ["speculative", "strict", "off", "self_speculative"])
def test_no_row_runs_for_nothing(name: str) -> None:
    """Rows of all forwards are the passes that the texts take alone, in fewer forwards; the last has few rows."""
    case, _ = uneven_case()
    decoder, verifier = watched(case, method_of(case, name))
    texts = decoder.generate_batch(LIVELY_PROMPTS, case.count)
    full, slim = (verifier.seen[kind] for kind in ("full", "slim"))
    passes = sum(text.counts.full_passes for text in texts)
    assert sum(forward.ids.shape[0] for forward in full) == passes + 4  # the prompts
    assert sum(forward.ids.shape[0] for forward in slim) == sum(text.counts.slim_passes for text in texts)
    assert len(full) < 0.7 * passes
    last = full[-1].window
    rows = last.cache.batch
    assert rows < len(LIVELY_PROMPTS)


@pytest.mark.parametrize(("drafter", "kind"), [("near", DraftPass), ("shallow", ShallowStep)])
def test_a_finished_row_leaves_the_drafters_cache(
    drafter: str, kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    several = kind.run_together.__func__

    def together(cls: type[Any], requests: Sequence[Any]) -> list[Any]:
        rows.append(requests[0].row.shared.batch)
        return several(cls, requests)  # type: ignore[no-any-return]

    monkeypatch.setattr(kind, "run_together", classmethod(together))
    case, _ = uneven_case()
    case = replace(case, drafter_kind=drafter)
    case.decoder(Speculative(3)).generate_batch(LIVELY_PROMPTS, case.count)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 5 > rows[-1]


def test_rows_gather_at_the_dear_passes() -> None:
    """q runs as often as for the text that needs it most, not once for each text."""
    case = lively_case(3)
    decoder, verifier = watched(case, case.method())
    texts = decoder.generate_batch(LIVELY_PROMPTS, case.count)
    assert len(verifier.seen["full"]) == 1 + max(text.counts.full_passes for text in texts)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each host read was for, as they come."""
    seen: list[int] = []
    one, several = Read.run, Read.run_together.__func__  # type: ignore[attr-defined]

    def run(self: Read) -> list[int]:
        seen.append(1)
        return one(self)

    def together(cls: type[Read], requests: Sequence[Read]) -> list[list[int]]:
        seen.append(len(requests))
        return several(cls, requests)  # type: ignore[no-any-return]

    monkeypatch.setattr(Read, "run", run)
    monkeypatch.setattr(Read, "run_together", classmethod(together))
    return seen


@pytest.mark.parametrize("name", ["autoregressive", "speculative", "self_speculative"])
def test_a_batch_waits_for_the_device_once_a_turn(name: str, reads: list[int]) -> None:
    """One read for each forward of q, whatever the number of texts."""
    case, _ = uneven_case()
    decoder, verifier = watched(case, method_of(case, name))
    reads.clear()
    texts = decoder.generate_batch(LIVELY_PROMPTS, case.count)
    after_prompts = verifier.seen["full"][1:]
    assert reads == [forward.ids.shape[0] for forward in after_prompts]
    assert sum(reads) == sum(text.counts.full_passes for text in texts)


@pytest.mark.parametrize("name", ["strict", "gated"])
def test_gates_are_read_for_all_rows_at_once(name: str, reads: list[int]) -> None:
    case, _ = uneven_case()
    case = replace(case, gates=case.gates.model_copy(update={"draft_stop_below": 0.55}))
    method = method_of(case, name)
    reads.clear()
    together = case.decoder(method).generate_batch(LIVELY_PROMPTS, case.count)
    shared = len(reads)
    assert together == alone(case, method, GREEDY, LIVELY_PROMPTS)
    assert shared < 0.7 * (len(reads) - shared)  # texts of unequal lengths, at unequal paces


@pytest.mark.parametrize("drafter", ["near", "shallow"])
@pytest.mark.parametrize("name", ["speculative", "strict", "self_speculative"])
def test_a_batch_of_one_is_run_as_a_single_text(name: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is put together with others, and every window is that of a single text."""

    def refuse(cls: type[Request[Any]], requests: Sequence[Request[Any]]) -> list[Any]:
        raise AssertionError(f"{len(requests)} requests of one text")

    for kind in (Read, ModelPass, ShallowStep):
        monkeypatch.setattr(kind, "run_together", classmethod(refuse))
    case = replace(lively_case(1), drafter_kind=drafter)
    decoder, verifier = watched(case, method_of(case, name))
    (text,) = decoder.generate_batch([case.prompt], case.count)
    windows = [forward.window for kind in verifier.seen.values() for forward in kind]
    assert all(isinstance(window.start, int) and window.rows is None is window.widths for window in windows)
    assert text == decoder.generate(case.prompt, case.count)


STOPS = st.lists(st.text("abcd", min_size=1, max_size=3), min_size=1, max_size=3)


@given(case=cases(), prompts=PROMPTS, stops=STOPS, number=st.integers(2, 30), name=st.sampled_from(METHODS))
def test_a_row_ends_at_its_own_end(
    case: Case, prompts: list[list[int]], stops: list[str], number: int, name: str
) -> None:
    """Stop strings look at the new text of a row, criteria at its whole text, end-of-text tokens at its tokens."""
    method = method_of(case, name)
    for end in ({"stop_strings": stops}, {"criteria": [SumDivides(number)]}):
        decoders = [case.decoder(method) for _ in range(1 + len(prompts))]
        for decoder in decoders:
            decoder.tokenizer = letter_tokenizer()
        together = decoders[0].generate_batch(prompts, case.count, **end)  # type: ignore[arg-type]
        pairs = zip(decoders[1:], prompts, strict=True)
        assert together == [decoder.generate(prompt, case.count, **end) for decoder, prompt in pairs]  # type: ignore[arg-type]


@given(case=cases(), prompts=PROMPTS, name=st.sampled_from(METHODS), asked=st.integers(0, 20))
def test_cancelled_texts_are_what_is_final(case: Case, prompts: list[list[int]], name: str, asked: int) -> None:
    method = method_of(case, name)
    fresh = alone(case, method, GREEDY, prompts)
    decoder, left = case.decoder(method), iter([False] * asked)
    together = decoder.generate_batch(prompts, case.count, batch_size=3, cancelled=lambda: next(left, True))
    for text, whole in zip(together, fresh, strict=True):
        assert text.tokens == whole.tokens[: len(text.tokens)]
        assert len(text.tiers) == len(text.drafted) == len(text.tokens)
    assert asked or all(text.tokens == [] for text in together)
    assert decoder.generate_batch(prompts, case.count, batch_size=3) == fresh


def test_a_batch_fills_the_context_to_its_end() -> None:
    """Shorter rows are padded within their own text: nothing lies beyond the longest."""
    case = replace(lively_case(0), count=6)
    prompts = [[3] * 250, [4, 5], [6] * 40]
    assert case.decoder(case.method()).generate_batch(prompts, 6) == alone(case, case.method(), GREEDY, prompts)


@pytest.mark.parametrize(
    ("prompts", "size", "complaint"),
    [
        ([[3], [], [4]], 8, "prompt 1 of the batch is empty"),
        ([[3], [3] * 300], 1, "304 positions are asked for.*context holds 256"),
        ([[3]], 0, "batch_size is 0"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_is(
    prompts: list[list[int]], size: int, complaint: str
) -> None:
    decoder, verifier = watched(lively_case(0), Autoregressive())
    with pytest.raises(PromptError, match=complaint):
        decoder.generate_batch(prompts, 4, batch_size=size)
    assert verifier.seen == {"full": [], "slim": []}


def test_no_prompts_give_no_texts() -> None:
    assert lively_case(0).decoder(Autoregressive()).generate_batch([], 4) == []


def test_logits_that_are_not_finite_are_refused() -> None:
    broken = RoutedModel(spoil(tiny_model()), Route(attention_skip=[1]))
    decoder = Decoder(broken, make_drafter("near", broken), lively_case(0).method())
    with pytest.raises(NumericsError, match="not finite"):
        decoder.generate_batch([[3, 4], [5]], 8)


LOG: list[tuple[Cost, int]] = []


@dataclasses.dataclass(frozen=True)
class Noted(Request[None]):
    """Does nothing, and writes down with how many."""

    def run(self) -> None:
        LOG.append((self.cost, 1))

    @classmethod
    def run_together(cls, requests: Sequence[Self]) -> list[None]:
        LOG.append((cls.cost, len(requests)))
        return [None] * len(requests)


class Drafting(Noted):
    cost: ClassVar[Cost] = Cost.DRAFT


class Checking(Noted):
    cost: ClassVar[Cost] = Cost.FULL


def test_the_cheapest_kind_runs_for_all_that_wait_for_it() -> None:
    def text(*steps: type[Noted]) -> Passes[None]:
        for kind in steps:
            yield kind()

    LOG.clear()
    ended: Iterator[list[int]] = run_together(
        [text(Drafting, Checking), text(Checking), text(Drafting, Drafting, Checking), text()]
    )
    assert list(ended) == [[3], [0, 1, 2]]
    assert LOG == [(Cost.DRAFT, 2), (Cost.DRAFT, 1), (Cost.FULL, 3)]


def test_a_device_flag_stops_a_draft_as_a_bool_does() -> None:
    case = lively_case(0)
    with torch.inference_mode():
        texts = [case.generate(Speculative(4, GATE, bound)) for bound in (0.0, 0.6, 1.0)]
    assert [text.tokens for text in texts] == [case.expected] * 3
    assert texts[0].counts.draft_steps != texts[1].counts.draft_steps != texts[2].counts.draft_steps
