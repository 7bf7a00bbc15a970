from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from tests.cases import METHODS, lively_case
from tests.number_formats import default_dtype
from tests.strategies import token_lists
from tests.tiny import VOCAB, tiny_model
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.draws import draw, process_rows
from viasd_calib.decoding.sampling import LEAST, MOST, Sampling
from viasd_calib.decoding.session import Generation
from viasd_calib.errors import SamplingError

FALSE_ALARM = 1e-6
"""A right sampler fails the chi-square tests here once in a million runs; seeds are fixed besides."""

SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)


def transformers_processors(settings: Sampling, custom: LogitsProcessorList) -> LogitsProcessorList:
    """What transformers' own ``generate`` would build from the same settings."""
    model: Any = tiny_model()
    config = GenerationConfig(
        do_sample=not settings.greedy,
        temperature=settings.temperature or 1.0,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p or None,
        repetition_penalty=settings.repetition_penalty,
    )
    found: LogitsProcessorList = model._get_logits_processor(config, input_ids_seq_length=2, logits_processor=custom)
    return found


@given(settings=SETTINGS, text=token_lists(4, 9), custom=st.booleans(), seed=st.integers(0, 99))
def test_rows_are_processed_as_transformers_does(settings: Sampling, text: list[int], custom: bool, seed: int) -> None:
    own = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)] if custom else [])
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(seed))
    found = process_rows(settings.processors(own), logits, torch.tensor(text))
    theirs = transformers_processors(settings, own)
    for row in range(3):
        prefix: Any = torch.tensor([text[: len(text) - 2 + row]])
        scores: Any = logits[row : row + 1].clone()
        torch.testing.assert_close(found[row : row + 1], theirs(prefix, scores))


class Recorder(LogitsProcessor):
    """Remembers the texts it is shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen.append(input_ids[0].tolist())
        return scores


def test_a_processor_sees_the_text_before_each_row() -> None:
    recorder = Recorder()
    process_rows(LogitsProcessorList([recorder]), torch.zeros(3, 5), torch.tensor([1, 2, 3, 4]))
    assert recorder.seen == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]


class Writer(LogitsProcessor):
    """Writes into what it is given."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.fill_(7)


def test_a_processor_cannot_change_the_logits() -> None:
    logits = torch.zeros(3, 5)
    assert process_rows(LogitsProcessorList([Writer()]), logits, torch.tensor([1, 2, 3, 4])).tolist() == [[7] * 5] * 3
    assert logits.tolist() == [[0] * 5] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 1e-38),
     ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")), ("min_p", -0.1), ("min_p", float("nan")),
     ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")), ("repetition_penalty", float("nan")),
     ("seed", -1), ("seed", 2**64)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    said = re.escape(str(value))
    with pytest.raises(SamplingError, match=rf"^{name} is {said}; give (0|more than 0)"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("temperature", "0.7", "a number"), ("temperature", True, "a number"), ("temperature", None, "a number"),
     ("top_k", 4.0, "a whole number"), ("top_k", True, "a whole number"), ("top_p", 1j, "a number"),
     ("min_p", [0.1], "a number"), ("repetition_penalty", b"1", "a number"), ("seed", 1.5, "a whole number"),
     ("seed", "7", "a whole number"), ("seed", None, "a whole number")],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(name: str, value: Any, kind: str) -> None:
    with pytest.raises(SamplingError, match=rf"^{name} is .*; give {kind}$"):
        Sampling(**{name: value})


def test_numbers_of_any_library_are_read() -> None:
    settings = Sampling(
        temperature=np.float32(0.5), top_k=torch.tensor(7), top_p=Fraction(1, 2), seed=np.uint64(2**64 - 1)
    )  # type: ignore[arg-type]
    assert settings == Sampling(temperature=0.5, top_k=7, top_p=0.5, seed=2**64 - 1)
    assert [type(value) for value in (settings.temperature, settings.top_k, settings.seed)] == [float, int, int]


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_draws(seed: int) -> None:
    """In a batch, too, whose texts have seeds of their own."""
    decoder = lively_case(0).decoder("strict", Sampling(temperature=1.0, seed=seed))
    again = lively_case(0).decoder("strict", Sampling(temperature=1.0, seed=seed))
    assert decoder.generate([5, 6], 12) == again.generate([5, 6], 12)
    assert len(again.generate_batch([[5, 6], [7]], 6)) == 2


@pytest.mark.parametrize("temperature", [LEAST, 1e-20, MOST])
def test_the_ends_of_the_temperatures_are_distributions(temperature: float) -> None:
    """Where the least one is drawn from, the text is the greedy one."""
    case = lively_case(0)
    text = case.decoder("strict", Sampling(temperature=temperature)).generate(case.prompt, 16).tokens
    assert (text == case.decoder("strict").generate(case.prompt, 16).tokens) == (temperature < 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("drafter", ["near", "shallow", "lookup+near"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_text_does_not_hang_on_torchs_default_number_format(
    dtype: torch.dtype, drafter: str, temperature: float
) -> None:
    case = dataclasses.replace(lively_case(1), drafter_kind=drafter)
    verifier, draft_model = case.verifier, case.drafter  # random weights are drawn once, in float32
    sampling = Sampling(temperature=temperature, top_p=0.95, min_p=0.01, seed=5)

    def texts() -> list[Generation]:
        decoder = Decoder(verifier, draft_model, case.named("strict"), case.eos, sampling)
        return [decoder.generate(case.prompt, 24), *decoder.generate_batch([case.prompt, [3, 4]], 12)]

    expected = texts()
    with default_dtype(dtype):
        assert texts() == expected


class ForbidBehind(LogitsProcessor):
    """Leaves no token once a text has so many."""

    stateless = True

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -torch.inf) if input_ids.shape[1] >= self.length else scores


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_place_where_nothing_may_follow_is_said(method: str, temperature: float) -> None:
    """Not the first token of the vocabulary written for ever; and a text that ends there needs no next token."""
    case = lively_case(2)
    sampling = Sampling(temperature=temperature)
    decoder = Decoder(case.verifier, case.drafter, case.named(method), case.eos, sampling, [ForbidBehind(20)])
    assert len(decoder.generate(case.prompt, 20 - len(case.prompt)).tokens) == 20 - len(case.prompt)
    with pytest.raises(SamplingError, match="the logits processors leave no token that may follow"):
        decoder.generate(case.prompt, 24)


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    tokens = draw(probs.expand(20_000, 4), torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=4).numpy()
    assert chisquare(counts, 20_000 * probs.double().numpy()).pvalue > FALSE_ALARM
    wrong = torch.tensor([0.47, 0.28, 0.15, 0.1])  # the test can fail
    assert chisquare(counts, 20_000 * wrong.double().numpy()).pvalue < FALSE_ALARM


def test_what_has_no_probability_is_never_drawn() -> None:
    probs = torch.tensor([0.0, 1e-30, 0.0]).expand(5_000, 3)
    assert set(draw(probs, torch.Generator().manual_seed(0)).tolist()) == {1}
