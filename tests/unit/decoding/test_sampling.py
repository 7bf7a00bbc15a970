from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from tests.strategies import token_lists
from tests.tiny import VOCAB, tiny_model
from viasd_calib.decoding.sampling import Sampling, draw, process_rows
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
    [("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1),
     ("repetition_penalty", 0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SamplingError, match=rf"^{name} is {value}; give --{name} (0|more than 0)"):
        Sampling(**{name: value})


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
