"""Under audit ``strict`` a sampled text has the probability that q gives it, whatever drafts and gates say.

The models are tables: q, q' and p are three bigram tables over a vocabulary of four, so that the
probability of every continuation is known exactly and a pass costs microseconds. 20,000 continuations of
three tokens are drawn for a near and a far drafter and held against the 64 exact probabilities; 2,000 for further
gates and settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from tests.tiny import random_gate
from viasd_calib.decoding.acceptance import SlimMasks
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.features import DRAFT_FEATURES, SLIM_FEATURES, DraftStatistics
from viasd_calib.decoding.planned import Planned, PlannedRow
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.session import Session
from viasd_calib.decoding.slim_rules.base import SlimRule
from viasd_calib.decoding.slim_rules.ratio import RatioRule
from viasd_calib.decoding.strategies.autoregressive import Autoregressive
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.multi_level import MultiLevel
from viasd_calib.decoding.strategies.self_speculative import SelfSpeculative
from viasd_calib.decoding.strategies.slim_only import SlimOnly
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.errors import SamplingError
from viasd_calib.slim.cache import SharedCache
from viasd_calib.slim.forward import RoutedModel, States
from viasd_calib.slim.parts.head_vocab import over_vocabulary
from viasd_calib.spec import Decoding, Gates, PolicyDrafter

VOCAB = 4
LENGTH = 3
TEXTS = 20_000
FEWER = 2_000
FEWEST = 1_000
PROMPT = [0, 1, 2, 3, 0]

FALSE_ALARM = 1e-5
"""For each chi-square test; with 52 of them a right decoder fails once in 2,000 runs of other seeds.
Seeds are fixed, so that a run that has passed passes again."""

FAR = 0.05
"""Total variation that no right decoder reaches: 20,000 draws from 64 texts diverge by about 0.02."""


class TableModel(RoutedModel):
    """q and q' as bigram tables: logits hang on the last token alone."""

    kind = torch.float32

    def __init__(self, full: Tensor, slim: Tensor) -> None:
        self.tables = torch.cat([full, slim])  # [2 * vocabulary, vocabulary]
        self.model: Any = torch.nn.Identity()  # what a backend would prepare
        self.slim_networks = ()
        self.config: Any = SimpleNamespace(
            vocab_size=VOCAB,
            hidden_size=2 * VOCAB,
            max_position_embeddings=64,
            num_hidden_layers=1,
            num_key_value_heads=1,
            head_dim=1,
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def new_cache(self, capacity: int, batch: int = 1) -> SharedCache:
        return SharedCache(self.config, capacity, batch=batch)

    def full(self, ids: Tensor, window: Any, taps: Sequence[int] = ()) -> States:
        return States(torch.nn.functional.one_hot(ids, 2 * VOCAB).float(), torch.zeros(*ids.shape, 0, 1))

    def slim(self, ids: Tensor, window: Any, taps: Sequence[int] = ()) -> States:
        return self.full(ids + VOCAB, window, taps)

    def logits(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.tables).to(self.kind)

    def slim_logits(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden)


class HalfModel(TableModel):
    """The same in bfloat16, whose few digits would bend draws that were made in it."""

    kind = torch.bfloat16


class NarrowModel(TableModel):
    """The same with a reduced head: q' cannot say two of the four tokens."""

    def slim_logits(self, hidden: Tensor) -> Tensor:
        return over_vocabulary(self.logits(hidden)[..., [0, 2]], torch.tensor([0, 2]), VOCAB)


def table(seed: int, like: Tensor | None = None) -> Tensor:
    """Random logits [vocabulary, vocabulary], or some that resemble another table's."""
    noise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    return 1.2 * noise if like is None else like + 0.7 * noise


FULL = table(0)
SLIM = table(1, like=FULL)
DRAFT = table(2, like=FULL)


def drafter(kind: str) -> Drafter | None:
    if kind == "none":
        return None
    if kind == "prompt_lookup":
        return PromptLookup()
    if kind == "combined":  # which of the two drafts hangs on what was drawn before
        near = drafter("near")
        assert near is not None
        return CombinedDrafter(near, VOCAB, max_ngram=3, min_ngram=2)
    tables = {"near": DRAFT, "far": table(3), "itself": FULL}
    return CausalDrafter(TableModel(tables[kind], tables[kind]), VOCAB)


def three_tier(seed: int, drafter: PolicyDrafter | None = None, max_pending: int = 5, **bounds: Any) -> ThreeTier:
    """Random gates; which places are trusted differs from text to text."""
    given: dict[str, Any] = {"accept_at": 0.5, "regenerate_at": 0.5, "draft_accept_at": 0.6, "draft_stop_below": 0.3}
    gates = Gates(draft=random_gate(DRAFT_FEATURES, seed), slim=random_gate(SLIM_FEATURES, seed + 1), **given | bounds)
    return ThreeTier.from_spec(gates, Decoding(draft_length=3, max_pending=max_pending, drafter=drafter))


def exact(sampling: Sampling, logits: Tensor = FULL) -> np.ndarray:
    """Probability of every continuation under q's processed distribution, [vocabulary ** length]."""
    probs = sampling.processors()(torch.empty(0), logits.clone()).softmax(-1).double()  # type: ignore[arg-type]
    chances = []
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        places = itertools.pairwise([PROMPT[-1], *text])
        chances.append(float(np.prod([probs[one, other].item() for one, other in places])))
    return np.array(chances)


def sample(
    method: Strategy, kind: str, sampling: Sampling, texts: int, model: type[TableModel] = TableModel
) -> np.ndarray:
    """How often each continuation is drawn, [vocabulary ** length]."""
    decoder = Decoder(model(FULL, SLIM), drafter(kind), method, sampling=sampling)
    counts = np.zeros(VOCAB**LENGTH)
    for _ in range(texts):
        one, two, three = decoder.generate(PROMPT, LENGTH).tokens
        counts[(one * VOCAB + two) * VOCAB + three] += 1
    return counts


def p_value(counts: np.ndarray, chances: np.ndarray) -> float:
    """Chi-square goodness of fit; texts that are hardly ever expected are one cell."""
    assert counts[chances == 0].sum() == 0, "a text was drawn that q never writes"
    rare = chances * counts.sum() < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(chances[~rare], chances[rare].sum()) * counts.sum()
    kept = expected > 0
    return float(chisquare(seen[kept], expected[kept] * seen.sum() / expected.sum()).pvalue)


def variation(counts: np.ndarray, chances: np.ndarray) -> float:
    """Total variation between the drawn and the exact distribution."""
    return float(np.abs(counts / counts.sum() - chances).sum() / 2)


PLAIN = Sampling(temperature=1.0)
CUT = Sampling(temperature=0.8, top_k=3, top_p=0.95, min_p=0.02)
TRUSTING = {"accept_at": 0.01, "regenerate_at": 0.01, "draft_accept_at": 1.01, "draft_stop_below": 0.0}
BLIND = {"accept_at": 1.01, "regenerate_at": 0.01, "draft_accept_at": 0.01, "draft_stop_below": 0.0}

Case = tuple[str, Callable[[], Strategy], str, Sampling, int]

CASES: list[Case] = [
    ("autoregressive", Autoregressive, "near", PLAIN, FEWER),
    ("speculative", lambda: Speculative(2), "near", PLAIN, FEWER),
    ("speculative, cut", lambda: Speculative(2), "far", CUT, FEWER),
    ("speculative, lookup", lambda: Speculative(2), "prompt_lookup", PLAIN, FEWER),
    ("three tiers, near", lambda: three_tier(5), "near", PLAIN, TEXTS),
    ("three tiers, far", lambda: three_tier(5), "far", PLAIN, TEXTS),
    ("three tiers, itself", lambda: three_tier(5), "itself", PLAIN, FEWER),
    ("three tiers, lookup", lambda: three_tier(5), "prompt_lookup", PLAIN, FEWER),
    ("speculative, lookup and model", lambda: Speculative(2), "combined", PLAIN, FEWER),
    ("three tiers, lookup and model", lambda: three_tier(5), "combined", PLAIN, FEWER),
    ("three tiers, cut", lambda: three_tier(8), "near", CUT, FEWER),
    ("three tiers, other gates", lambda: three_tier(11), "near", PLAIN, FEWER),
    ("three tiers, q' always trusted", lambda: three_tier(5, **TRUSTING), "near", PLAIN, FEWER),
    ("three tiers, no draft model", lambda: three_tier(5, "slim"), "none", PLAIN, FEWER),
    ("no draft model, q' always trusted", lambda: three_tier(5, "slim", **TRUSTING), "none", CUT, FEWER),
    ("three tiers, lookup in its place", lambda: three_tier(5, "lookup"), "prompt_lookup", PLAIN, FEWER),
    ("multi-level", lambda: MultiLevel(draft_length=2, max_pending=4), "near", PLAIN, FEWER),
    ("three tiers, p always trusted", lambda: three_tier(5, **BLIND), "far", PLAIN, FEWER),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_strict_text_has_qs_distribution(case: Case) -> None:
    _, method, kind, sampling, texts = case
    chances = exact(sampling)
    counts = sample(method(), kind, sampling, texts)
    assert p_value(counts, chances) > FALSE_ALARM
    assert variation(counts, chances) < FAR * (TEXTS / texts) ** 0.5


def exact_texts(sampling: Sampling, eos: int | None, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every text that ends with ``eos`` or is ``length`` tokens long; processors see all before."""
    processors, ended, growing = sampling.processors(), {}, {(): 1.0}
    for place in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for text, chance in growing.items():
            ids: Any = torch.tensor([[*PROMPT, *text]])
            scores: Any = FULL[int(ids[0, -1])][None].clone()
            for token, share in enumerate(processors(ids, scores).softmax(-1)[0].double().tolist()):
                target = ended if token == eos or place == length - 1 else longer
                target[(*text, token)] = chance * share
        growing = longer
    return ended


PENALISED = Sampling(temperature=0.9, repetition_penalty=1.6)
LONG = 6
"""Tokens: enough for the pending bound to be reached in the midst of a text."""

EndingCase = tuple[str, Callable[[], Strategy], Sampling, int | None, int]
ENDING: list[EndingCase] = [
    ("end of sequence", lambda: three_tier(5), PLAIN, 2, LONG),
    ("end of sequence, q' always trusted", lambda: three_tier(5, **TRUSTING), PLAIN, 2, LONG),
    ("end of sequence, p always trusted", lambda: three_tier(5, **BLIND), PLAIN, 2, LONG),
    ("repetition penalty", lambda: three_tier(5), PENALISED, None, LENGTH),
    ("repetition penalty, q' always trusted", lambda: three_tier(5, **TRUSTING), PENALISED, None, LENGTH),
    ("penalty and end of sequence", lambda: three_tier(8), PENALISED, 2, LONG),
    ("one may be pending", lambda: three_tier(5, None, 1, **TRUSTING), PLAIN, 2, LONG),
    ("two may be pending", lambda: three_tier(5, None, 2, **TRUSTING), PLAIN, None, LENGTH),
    ("two may be pending, p always trusted", lambda: three_tier(5, None, 2, **BLIND), PLAIN, 2, LONG),
    ("speculative, penalty and end of sequence", lambda: Speculative(2), PENALISED, 2, LONG),
    ("speculative, drafting is reduced", lambda: Speculative(2, drafting_pays_at=0.9), PLAIN, 2, LONG),
    ("three tiers, drafting is reduced", lambda: replace(three_tier(5), drafting_pays_at=0.9), PLAIN, 2, LONG),
    (
        "drafting is reduced, q' always trusted",
        lambda: replace(three_tier(5, None, 2, **TRUSTING), drafting_pays_at=1.0),
        PLAIN,
        2,
        LONG,
    ),
]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("case", ENDING, ids=[case[0] for case in ENDING])
def test_ends_penalties_full_pending_and_batches_bend_nothing(case: EndingCase, batch: int) -> None:
    """Twenty-six more chi-square tests, each with the same false-alarm rate."""
    _, method, sampling, eos, length = case
    chances = exact_texts(sampling, eos, length)
    decoder = Decoder(TableModel(FULL, SLIM), drafter("near"), method(), () if eos is None else (eos,), sampling)
    if batch == 1:
        texts = [decoder.generate(PROMPT, length).tokens for _ in range(FEWEST)]
    else:
        found = decoder.generate_batch([PROMPT] * FEWEST, length, batch_size=batch)
        texts = [one.tokens for one in found]
    numbers = {text: number for number, text in enumerate(chances)}
    counts = np.bincount([numbers[tuple(text)] for text in texts], minlength=len(chances)).astype(float)
    assert p_value(counts, np.array(list(chances.values()))) > FALSE_ALARM


def planned(few: ThreeTier, more: ThreeTier, many: ThreeTier) -> Planned:
    """A policy for one text alone, another one up to three, a third one beyond: all follow each other in a batch."""
    return Planned([PlannedRow(None, 1, few), PlannedRow(None, 3, more), PlannedRow(None, None, many)])


PLANNED: dict[str, Callable[[], Planned]] = {
    "other gates": lambda: planned(three_tier(5), three_tier(8), three_tier(11)),
    "trusting, blind and bounded": lambda: planned(
        three_tier(5, None, 2, **BLIND), three_tier(5, **TRUSTING), three_tier(8, None, 1, **TRUSTING)
    ),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_by_batch_bends_nothing(name: str) -> None:
    """Two more: which policy a round follows hangs on which of the other texts have ended, and when."""
    chances = exact_texts(PLAIN, 2, LONG)
    decoder = Decoder(TableModel(FULL, SLIM), drafter("near"), PLANNED[name](), (2,), PLAIN)
    found = decoder.generate_batch([PROMPT] * FEWER, LONG, batch_size=5)
    numbers = {text: number for number, text in enumerate(chances)}
    counts = np.bincount([numbers[tuple(one.tokens)] for one in found], minlength=len(chances)).astype(float)
    assert p_value(counts, np.array(list(chances.values()))) > FALSE_ALARM


def test_a_full_pending_bound_is_reached_in_the_midst_of_a_text() -> None:
    """Where one token may be pending, q is asked more often than where all may, and the draft was cut for it."""

    def passes(max_pending: int) -> int:
        method = three_tier(5, None, max_pending, **TRUSTING)
        decoder = Decoder(TableModel(FULL, SLIM), drafter("near"), method, sampling=PLAIN)
        return sum(decoder.generate(PROMPT, LONG).counts.full_passes for _ in range(50))

    assert passes(1) > 1.2 * passes(LONG + 3)


def test_drafting_is_reduced_within_such_texts() -> None:
    """Else the tests of it above would show nothing: fewer draft steps, in most texts of six tokens."""

    def steps(pays_at: float | None) -> int:
        decoder = Decoder(
            TableModel(FULL, SLIM), drafter("near"), Speculative(2, drafting_pays_at=pays_at), sampling=PLAIN
        )
        return sum(decoder.generate(PROMPT, LONG).counts.draft_steps for _ in range(100))

    assert steps(0.9) < 0.9 * steps(None)


def test_a_penalty_that_is_left_out_is_found_out() -> None:
    """The negative control: q's texts without the penalty are not those with it."""
    chances = exact_texts(PENALISED, None, LENGTH)
    counts = sample(three_tier(5), "near", Sampling(temperature=0.9), FEWER)
    assert p_value(counts, np.array(list(chances.values()))) < FALSE_ALARM


def test_draws_are_made_in_float32() -> None:
    """Also where the verifier's logits are of two bytes."""
    counts = sample(three_tier(5), "near", PLAIN, FEWER, HalfModel)
    assert p_value(counts, exact(PLAIN, FULL.to(torch.bfloat16).float())) > FALSE_ALARM


def test_a_text_of_the_slim_verifier_alone_has_its_distribution() -> None:
    counts = sample(SlimOnly(), "near", CUT, FEWER)
    assert p_value(counts, exact(CUT, SLIM)) > FALSE_ALARM
    assert p_value(counts, exact(PLAIN)) < FALSE_ALARM


@pytest.mark.parametrize(
    "method",
    [lambda: three_tier(5), lambda: three_tier(5, **TRUSTING), lambda: SelfSpeculative(2), MultiLevel],
    ids=["three tiers", "q' always trusted", "self-speculative", "multi-level"],
)
def test_what_the_slim_verifier_cannot_emit_is_emitted(method: Callable[[], Strategy]) -> None:
    """q writes half of its text without the tokens of q'; the text is drawn from q's distribution all the same."""
    counts = sample(method(), "near", PLAIN, FEWER, NarrowModel)
    assert p_value(counts, exact(PLAIN)) > FALSE_ALARM
    assert variation(counts, exact(PLAIN)) < FAR * (TEXTS / FEWER) ** 0.5


class Liking(SlimRule):
    """Lets q' decide where it likes the very token that was drawn."""

    sees_draw = True

    def masks(self, logits: Tensor, draft: DraftStatistics, pending: int) -> SlimMasks:
        liked = logits[:-1].softmax(-1).gather(-1, draft.tokens[:, None])[:, 0] >= 0.4
        return SlimMasks(liked, torch.cat([liked, liked.new_zeros(1)]))


class Peeking(ThreeTier):
    """Shows its rule the drawn tokens, which the honest decoder never does."""

    def _masks_before_draw(self, session: Session, rule: SlimRule, logits: Tensor, draft: DraftStatistics) -> SlimMasks:
        return rule.masks(logits, draft, session.pending)


def test_a_gate_that_looks_at_the_drawn_token_is_found_out() -> None:
    """The negative control of the test above."""
    broken = Peeking(Liking(), draft_length=3, max_pending=5)
    assert p_value(sample(broken, "near", PLAIN, 2 * FEWER), exact(PLAIN)) < FALSE_ALARM
    with pytest.raises(SamplingError, match="looks at the token that was drawn"):
        sample(ThreeTier(Liking()), "far", PLAIN, 1)


def test_an_audit_that_is_off_is_found_out() -> None:
    method = three_tier(5, **TRUSTING)
    method.audit = "off"
    assert p_value(sample(method, "near", PLAIN, FEWER), exact(PLAIN)) < FALSE_ALARM


def test_the_ratio_convention_does_not_sample() -> None:
    decoder = Decoder(TableModel(FULL, SLIM), drafter("near"), ThreeTier(RatioRule(0.7, 0.5)), sampling=PLAIN)
    with pytest.raises(SamplingError, match="looks at the token that was drawn"):
        decoder.generate(PROMPT, LENGTH)
