from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import families, token_lists
from tests.tiny import VOCAB, spoil, tiny_model, transformers_logits, transformers_text
from viasd_calib.decoding.sampling import Sampling
from viasd_calib.decoding.top_k import stack_top_k
from viasd_calib.errors import NumericsError, PromptError, SamplingError
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.generation import Answer, answer_batch, pad_right


def answers(
    prompts: list[list[int]],
    count: int,
    eos: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    seed: int = 0,
    family: str = "llama",
) -> list[Answer]:
    return answer_batch(
        RoutedModel(tiny_model(seed, family)),
        prompts,
        max_new_tokens=count,
        eos_ids=eos,
        sampling=sampling or Sampling(),
        top_k_size=4,
        taps=TAPS,
    )


TAPS = (0, 1, 3)
PROMPTS = st.lists(token_lists(1, 8), min_size=1, max_size=5)
EOS = st.frozensets(st.integers(0, VOCAB - 1), max_size=4)


@given(family=families(), prompts=PROMPTS, count=st.integers(1, 16), eos=EOS, seed=st.integers(0, 1))
def test_rows_are_single_texts_are_transformers_texts(
    family: str, prompts: list[list[int]], count: int, eos: frozenset[int], seed: int
) -> None:
    batch = answers(prompts, count, eos, seed=seed, family=family)
    for prompt, answer in zip(prompts, batch, strict=True):
        (alone,) = answers([prompt], count, eos, seed=seed, family=family)
        assert answer.tokens == alone.tokens == transformers_text(tiny_model(seed, family), prompt, count, eos)


@given(prompts=PROMPTS, count=st.integers(1, 12), eos=EOS, temperature=st.sampled_from([0.0, 0.8]))
def test_what_is_noted_is_what_the_verifier_says(
    prompts: list[list[int]], count: int, eos: frozenset[int], temperature: float
) -> None:
    """Summaries and hidden states, one a token, equal those of one pass over the whole text."""
    model = tiny_model()
    for prompt, answer in zip(prompts, answers(prompts, count, eos, Sampling(temperature)), strict=True):
        text = [*prompt, *answer.tokens]
        with torch.inference_mode():
            states = model.get_decoder()(input_ids=torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
        tapped = torch.stack([states[tap][0] for tap in TAPS], 1)
        torch.testing.assert_close(torch.cat(answer.tapped), tapped, atol=1e-4, rtol=1e-4)
        log_probs = transformers_logits(model, text)[len(prompt) - 1 : -1].log_softmax(-1)
        said = stack_top_k(answer.top_k)
        torch.testing.assert_close(said.log_probs, log_probs.topk(4).values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said.log_probs, log_probs.gather(-1, said.ids), atol=1e-4, rtol=1e-4)
        if temperature == 0:
            assert said.ids[:, 0].tolist() == answer.tokens


def test_an_end_of_text_ends_its_row_alone() -> None:
    (plain,) = answers([[3, 4]], 12)
    stop = plain.tokens[5]
    short, other = answers([[3, 4], [9]], 12, frozenset({stop}))
    assert short.tokens == plain.tokens[: plain.tokens.index(stop) + 1]
    assert len(short.tokens) < 12
    assert len(other.tokens) == 12 or other.tokens[-1] == stop


def test_sampling_repeats_with_its_seed_and_varies_with_another() -> None:
    prompts = [[3, 4], [5]]
    texts = [[a.tokens for a in answers(prompts, 12, sampling=Sampling(1.0, seed=seed))] for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_repetition_penalty_is_refused() -> None:
    with pytest.raises(SamplingError, match="without a repetition penalty"):
        answers([[3, 4]], 4, sampling=Sampling(repetition_penalty=1.2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature: float) -> None:
    with pytest.raises(NumericsError, match="not finite; load it in float32"):
        answer_batch(
            RoutedModel(spoil(tiny_model())),
            [[3, 4], [5]],
            max_new_tokens=4,
            eos_ids=frozenset(),
            sampling=Sampling(temperature),
        )


def test_a_batch_beyond_the_context_is_refused() -> None:
    with pytest.raises(PromptError, match="context holds 256"):
        answers([[3], [4] * 250], 7)


def test_pad_right() -> None:
    ids, lengths = pad_right([[1], [2, 3, 4], [5, 6]], torch.device("cpu"))
    assert ids.tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]
    assert lengths.tolist() == [1, 3, 2]
