"""Arguments of generate, stream and generate_batch: read alike, and refused before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.cases import lively_case
from tests.tiny import VOCAB
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.transformers_baseline import TransformersDecoder
from viasd_calib.errors import PromptError

IDS = [7, 8, 9]

Call = Callable[..., Any]


def generated(decoder: Decoder, prompt: Any, count: Any, **settings: Any) -> list[int]:
    return decoder.generate(prompt, count, **settings).tokens


def streamed(decoder: Decoder, prompt: Any, count: Any, **settings: Any) -> list[int]:
    return [emitted.token for emitted in decoder.stream(prompt, count, **settings)]


def batched(decoder: Decoder, prompt: Any, count: Any, **settings: Any) -> list[int]:
    return decoder.generate_batch([[3, 4], prompt], count, **settings)[1].tokens


CALLS: list[Call] = [generated, streamed, batched]


@pytest.mark.parametrize("call", CALLS)
def test_all_read_the_same_text(call: Call) -> None:
    decoder = lively_case(0).decoder("strict")
    expected = decoder.generate(IDS, 6).tokens
    for prompt in (tuple(IDS), range(7, 10), torch.tensor([IDS]), np.array(IDS)):
        assert call(decoder, prompt, np.int64(6)) == expected


def called(decoder: Decoder, *args: Any, **settings: Any) -> None:
    """A stream that nobody reads."""
    decoder.stream(*args, **settings)


@pytest.mark.parametrize("call", [generated, called, batched])
@pytest.mark.parametrize(
    ("prompt", "count", "settings", "complaint"),
    [
        ([5, VOCAB], 4, {}, "has the id 24 at place 1, but the verifier's ids run from 0 to 23"),
        ([5, -100], 4, {}, "has the id -100 at place 1"),
        ("w1", 4, {}, "give a list of token ids"),
        (IDS, True, {}, r"max_new_tokens is True \(bool\)"),
        (IDS, 10**30, {}, "context holds 256; shorten the prompt, or ask for fewer tokens"),
        (IDS, 4, {"stop_strings": [3]}, r"stop_strings is \[3\]; give a string or a list of strings"),
        (IDS, 4, {"stop_strings": b"ab"}, "stop_strings is b'ab'; give a string"),
        (IDS, 4, {"stop_strings": 7}, "stop_strings is 7; give a string"),
    ],
)
def test_all_refuse_the_same(call: Call, prompt: Any, count: Any, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        call(lively_case(0).decoder("strict"), prompt, count, **settings)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4", None])
def test_a_batch_size_is_a_whole_number(size: Any) -> None:
    with pytest.raises(PromptError, match=r"^batch_size is .*; give a whole number, 1 or more"):
        lively_case(0).decoder("strict").generate_batch([IDS], 4, batch_size=size)


def test_transformers_own_generate_reads_them_too() -> None:
    case = lively_case(0)
    decoder = TransformersDecoder(case.verifier, frozenset())
    assert decoder.generate(torch.tensor([IDS]), 4) == decoder.generate(IDS, 4)
    with pytest.raises(PromptError, match="the prompt has the id 24 at place 0"):
        decoder.generate([VOCAB], 4)
    with pytest.raises(PromptError, match=r"max_new_tokens is 2\.0"):
        decoder.generate(IDS, 2.0)  # type: ignore[arg-type]
