"""What callers give as token ids and counts: what is clearly meant is read, the rest refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from viasd_calib.errors import PromptError
from viasd_calib.token_ids import read_batch, read_count, read_token_ids

VOCAB = 24
IDS = [7, 8, 9]

SAME_TEXT: dict[str, Any] = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(7, 10),
    "tensor": torch.tensor(IDS),
    "tensor of return_tensors='pt'": torch.tensor([IDS]),
    "int32 tensor": torch.tensor(IDS, dtype=torch.int32),
    "array": np.array(IDS),
    "array of one row": np.array([IDS], dtype=np.uint16),
    "list of one row": [IDS],
    "list of tensors": [torch.tensor(7), torch.tensor(8), torch.tensor(9)],
    "list of numpy integers": [np.int64(7), np.int32(8), np.uint8(9)],
}


@pytest.mark.parametrize("prompt", SAME_TEXT.values(), ids=SAME_TEXT)
def test_what_is_clearly_one_text_is_read(prompt: Any) -> None:
    ids = read_token_ids(prompt, VOCAB)
    assert ids == IDS
    assert {type(value) for value in ids} == {int}
    assert read_batch([prompt, [1]], VOCAB) == [IDS, [1]]


@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=1))
def test_any_ids_of_the_vocabulary_are_read(ids: list[int]) -> None:
    assert read_token_ids(ids, VOCAB) == read_token_ids(torch.tensor([ids]), VOCAB) == ids


REFUSED: dict[str, tuple[Any, str]] = {
    "the size of the vocabulary": (
        [5, VOCAB],
        "has the id 24 at place 1, but the verifier's ids run from 0",
    ),
    "a label's -100": ([5, 6, -100], "has the id -100 at place 2"),
    "beyond 64 bits": ([2**70], f"has the id {2**70} at place 0"),
    "a tensor out of range": (torch.tensor([[5, 30]]), "has the id 30 at place 1"),
    "none": ([], "the prompt is empty; give at least one token"),
    "an empty tensor": (torch.zeros(1, 0), "the prompt is empty"),
    "floats": ([5.0, 6.0], r"has 5\.0 \(float\) at place 0; token ids are whole numbers"),
    "a float tensor": (torch.tensor([5.0]), r"has 5\.0 \(float\) at place 0"),
    "booleans": ([True, False], r"has True \(bool\) at place 0"),
    "a boolean tensor": (torch.tensor([True]), r"has True \(bool\) at place 0"),
    "words": (["w1"], r"has 'w1' \(str\) at place 0"),
    "an absent id": ([5, None], r"has None \(NoneType\) at place 1"),
    "mixed depths": ([5, [6]], "has a value of type list at place 1"),
    "a text": ("w1 w2", r"is 'w1 w2' \(str\); give a list of token ids, as engine\.verifier\.encode_chat"),
    "bytes": (b"\1\2", r"\(bytes\); give a list of token ids"),
    "a long text": ("w" * 99, r"is 'w{36}\.\.\. \(str\)"),
    "a number": (5, r"is 5 \(int\); give a list"),
    "nothing": (None, r"is None \(NoneType\); give a list"),
    "a set": ({5, 6}, "is a value of type set; give a list"),
    "a generator": ((id for id in IDS), "is a value of type generator; give a list"),
    "a scalar tensor": (torch.tensor(5), "is a value of type Tensor; give a list"),
    "a tokenizer's whole output": (BatchEncoding({"input_ids": IDS}), "BatchEncoding; give its input_ids alone"),
    "two rows": ([[5], [6]], "holds 2 texts; give one, or all of them to generate_batch"),
    "a tensor of two rows": (torch.ones(2, 3, dtype=torch.long), "holds 2 texts"),
    "three dimensions": (torch.ones(1, 1, 3, dtype=torch.long), "has a value of type list at place 0"),
}


@pytest.mark.parametrize(("prompt", "complaint"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_one_text_is_refused(prompt: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        read_token_ids(prompt, VOCAB)


def test_a_batch_names_the_text() -> None:
    assert read_batch(torch.tensor([[5, 6], [7, 8]]), VOCAB) == [[5, 6], [7, 8]]
    assert read_batch([], VOCAB) == []
    with pytest.raises(PromptError, match="prompt 1 of the batch has the id 99 at place 0"):
        read_batch([[5], [99]], VOCAB)
    with pytest.raises(PromptError, match=r"prompt 0 of the batch is 5 \(int\)"):
        read_batch([5, 6], VOCAB)  # type: ignore[list-item]
    with pytest.raises(PromptError, match=r"the prompts are 'w1' \(str\); give a list with the token ids of each"):
        read_batch("w1", VOCAB)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_a_count_is_a_whole_number(value: object) -> None:
    count = read_count(value, "max_new_tokens")
    assert (count, type(count)) == (3, int)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (-1, "-1"), (True, r"True \(bool\)"), (2.0, r"2\.0 \(float\)"), ("3", r"'3' \(str\)"),
        (None, r"None \(NoneType\)"), (float("nan"), r"nan \(float\)"), ([3], "a value of type list"),
        (torch.tensor(True), "a value of type Tensor"),
    ],
)  # fmt: skip
def test_other_counts_are_refused(value: object, said: str) -> None:
    with pytest.raises(PromptError, match=f"^max_new_tokens is {said}; give a whole number, 1 or more$"):
        read_count(value, "max_new_tokens")
