from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import token_lists
from tests.tiny import tiny_model, transformers_logits, transformers_text
from viasd_calib.cli.bench import describe_differences, refuse_unexplained
from viasd_calib.errors import BenchError
from viasd_calib.evaluation.batches import BatchResult
from viasd_calib.evaluation.bench import BenchResult
from viasd_calib.evaluation.exactness import Difference, find_difference, first_place, near_tie_bound
from viasd_calib.slim.forward import RoutedModel

PROMPT = [3, 4]


@given(one=token_lists(0, 6, vocab=3), other=token_lists(0, 6, vocab=3))
def test_first_place(one: list[int], other: list[int]) -> None:
    place = first_place(one, other)
    if place is None:
        assert one == other
    else:
        assert one[:place] == other[:place]
        assert one[place : place + 1] != other[place : place + 1]


def found(tokens: list[int], reference: list[int]) -> Difference | None:
    return find_difference(RoutedModel(tiny_model()), "a", 1, PROMPT, tokens, reference)


def test_the_gap_is_that_of_the_two_tokens() -> None:
    reference = transformers_text(tiny_model(), PROMPT, 6, ())
    tokens = [*reference[:3], (reference[3] + 1) % 24, *reference[4:]]
    difference = found(tokens, reference)
    assert difference is not None
    logits = transformers_logits(tiny_model(), [*PROMPT, *reference[:3]])[-1]
    assert (difference.prompt_id, difference.turn, difference.place) == ("a", 1, 3)
    assert difference.gap == pytest.approx(float(logits[reference[3]] - logits[tokens[3]]), abs=1e-5)
    assert difference.near_tie == pytest.approx(32 * torch.finfo(torch.float32).eps * float(logits.abs().max()))
    assert not difference.explained
    assert found(reference, reference) is None


def test_a_text_that_merely_ends_is_never_explained() -> None:
    reference = transformers_text(tiny_model(), PROMPT, 6, ())
    difference = found(reference[:4], reference)
    assert difference is not None
    assert difference.gap is None
    assert not difference.explained


def test_the_bound_grows_with_rounding() -> None:
    logits = torch.tensor([1.0, -30.0])
    assert near_tie_bound(logits, torch.bfloat16) == pytest.approx(4 * 30 / 128)
    assert near_tie_bound(logits, torch.float32) < 2e-4


def result(gap: float | None, audit: str = "strict", name: str = "three_tier") -> BenchResult:
    difference = {"prompt_id": "a", "turn": 0, "place": 7, "gap": gap, "near_tie": 0.5}
    method: dict[str, Any] = {
        "tokens": 9, "seconds": 1.0, "tokens_per_second": 9.0, "speedup_vs_autoregressive": None,
        "speedup_vs_speculative": None, "identical_to_autoregressive": 0.0, "divergence": 0.0, "rejection_rate": None,
        "full_passes_per_token": 1.0, "slim_passes_per_token": 0.0, "draft_steps_per_token": 0.0,
        "acceptance_length": 1.0, "tier_shares": {}, "differences": [difference],
    }  # fmt: skip
    settings = {"methods": [name], "max_new_tokens": 9, "dtype": "bfloat16", "audit": audit, "seed": 0}
    document = {"hardware": {}, "settings": settings, "n_prompts": 2, "methods": {name: method}, "by_task": {}}
    return BenchResult.model_validate(document)


@pytest.mark.parametrize(("gap", "words"), [(0.6, "a gap of 0.6"), (-0.6, "a gap of -0.6"), (None, "an end of text")])
def test_a_lossless_method_that_strays_fails(gap: float | None, words: str) -> None:
    with pytest.raises(BenchError, match=f"three_tier is lossless, but left .* token 7 of a by {words}"):
        refuse_unexplained(result(gap))


def test_a_near_tie_and_a_lossy_method_pass() -> None:
    refuse_unexplained(result(0.4))
    refuse_unexplained(result(0.6, audit="off"))
    refuse_unexplained(result(0.6, name="lenient"))
    (line,) = describe_differences(result(-0.4))
    assert "three_tier: 1 of 2 prompts" in line
    assert "widest 0.4" in line
    assert describe_differences(result(0.6, audit="off")) == []


def batched(gap: float | None) -> BenchResult:
    """Single texts that are the autoregressive ones up to a near tie, and batches that leave them by ``gap``."""
    methods = result(gap).methods
    together = BatchResult(texts=[4, 2], methods=methods, peak_memory_bytes={})
    return result(0.1).model_copy(update={"by_batch": {4: together}})


def test_a_batch_that_strays_fails() -> None:
    with pytest.raises(BenchError, match=r"three_tier in batches of 4 is lossless, but left .* by a gap of 0\.6"):
        refuse_unexplained(batched(0.6))
    refuse_unexplained(batched(0.4))
    assert [line.split(":")[0] for line in describe_differences(batched(0.4))] == [
        "three_tier", "three_tier in batches of 4",
    ]  # fmt: skip


def test_batches_are_read_back() -> None:
    written = batched(0.6)
    assert BenchResult.model_validate_json(written.model_dump_json()) == written
    assert "by_batch" not in result(0.6).model_dump()


@given(gap=st.none() | st.floats(-3, 3))
def test_it_is_read_back(gap: float | None) -> None:
    written = result(gap)
    assert BenchResult.model_validate_json(written.model_dump_json()) == written
