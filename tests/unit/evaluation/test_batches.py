"""Which prompts of a benchmark are decoded together."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_prompts
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.batches import check_batch_sizes, draw_batches

PROMPTS = tiny_prompts(11)


@pytest.mark.parametrize("size", [2, 4, 11])
def test_every_prompt_is_in_one_batch(size: int) -> None:
    batches = draw_batches(PROMPTS, size, seed=0)
    assert sorted(prompt.id for batch in batches for prompt in batch.prompts) == sorted(one.id for one in PROMPTS)
    assert [len(batch.prompts) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert len({batch.step for batch in batches}) == len(batches)


def test_the_order_is_drawn_once() -> None:
    """For all sizes the same, whatever the order of the file; another seed draws another."""
    order = [[one.id for batch in draw_batches(PROMPTS, size, 0) for one in batch.prompts] for size in (2, 3, 11)]
    assert order[0] == order[1] == order[2] != [one.id for one in PROMPTS]
    assert draw_batches(PROMPTS[::-1], 3, 0) == draw_batches(PROMPTS, 3, 0)
    assert draw_batches(PROMPTS, 11, 1)[0].prompts != draw_batches(PROMPTS, 11, 0)[0].prompts


def test_single_texts_stay_in_the_order_of_the_file() -> None:
    batches = draw_batches(PROMPTS, 1, 0)
    assert [batch.prompts for batch in batches] == [[prompt] for prompt in PROMPTS]
    assert [batch.step for batch in batches] == [prompt.sha256 for prompt in PROMPTS]


def test_a_prompt_that_stands_twice_is_decoded_twice() -> None:
    copies = [PROMPTS[0], PROMPTS[0].model_copy(update={"id": "copy"})]
    (batch,) = draw_batches(copies, 2, 0)
    assert sorted(prompt.id for prompt in batch.prompts) == sorted(prompt.id for prompt in copies)


def test_a_batch_step_is_of_its_size_and_prompts() -> None:
    """A ledger must not take what two prompts came to for what one of them, or others, came to."""
    steps = {batch.step for size in (1, 2, 3, 11) for batch in draw_batches(PROMPTS, size, 0)}
    assert len(steps) == 11 + 6 + 4 + 1
    mended = [*PROMPTS[:-1], PROMPTS[-1].model_copy(update={"turns": ["w9 w9"]})]
    assert len(steps & {batch.step for batch in draw_batches(mended, 11, 0)}) == 0


def test_a_batch_that_is_never_full_is_refused() -> None:
    check_batch_sizes([1, 11], 11, ["speculative"])
    with pytest.raises(BenchError, match="--batch 12 takes as many prompts at least, and there are 11"):
        check_batch_sizes([1, 12, 4], 11, ["speculative"])


def test_transformers_decodes_no_batch() -> None:
    check_batch_sizes([1], 11, ["transformers"])
    with pytest.raises(BenchError, match="transformers is measured with one text at a time; leave it out of"):
        check_batch_sizes([1, 4], 11, ["autoregressive", "transformers"])
