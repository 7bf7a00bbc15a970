from __future__ import annotations

import functools
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel_cases import CONTROL, cases, differences, noise
from tests.rounding import assert_near
from tests.triton_tools import assert_is_for, compiled_for, fresh_module, in_a_new_process, needs_triton
from viasd_calib.decoding.kernels import (
    LogitStatistics,
    join_statistics,
    logit_statistics,
    logit_statistics_torch,
)
from viasd_calib.decoding.kernels.fused import NARROWEST_BLOCK, PROGRAMS_PER_PROCESSOR, WIDEST_BLOCK, block_size
from viasd_calib.decoding.kernels.native import logit_statistics_native
from viasd_calib.decoding.top_k import top_k_statistics
from viasd_calib.slim.argmax import argmax, largest_logit
from viasd_calib.slim.native.library import cpu_has_kernels

FLOATS = ("maximum", "log_sum_exp", "entropy", "second", "log_ratio")

# Few values, so that ties are frequent.
LOGIT = st.one_of(st.floats(-30, 30, width=16), st.sampled_from([-1.0, 0.0, 2.5, -math.inf]))
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 12))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOKENS = torch.tensor([1, 2, 3])


# --- the compiled kernels against the reference ---


@pytest.mark.skipif(not cpu_has_kernels(), reason="this CPU has no compiled kernels")
@pytest.mark.parametrize("name", cases())
def test_the_compiled_kernels_against_the_reference(name: str) -> None:
    case = cases()[name]
    logits = case.logits.bfloat16()
    found = logit_statistics_native(logits, case.tokens)
    assert differences(found, logit_statistics_torch(logits, case.tokens), logits.shape[1]) == []
    proper = ~found.log_sum_exp.isnan()
    assert torch.equal(argmax(logits)[proper], found.argmax[proper])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logit_as_amax(dtype: torch.dtype) -> None:
    """Where logits are no numbers, infinite or impossible too: catch-up refuses rows by it."""
    logits = noise(6, 1237).to(dtype)
    logits[1, 1236], logits[2, 0], logits[3, 7] = math.nan, math.inf, -math.inf
    logits[4] = -math.inf
    logits[5] = -math.inf
    logits[5, 17] = math.nan
    for rows in (logits, logits[:0], logits[None, ::2, ::3]):
        found = largest_logit(rows)
        torch.testing.assert_close(found, rows.amax(-1).float(), rtol=0, atol=0, equal_nan=True)


# --- the reference against torch ---


@given(data=st.data(), shape=SHAPES, dtype=DTYPES)
def test_the_reference_against_torch(data: st.DataObject, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, vocabulary = shape
    entries = data.draw(st.lists(LOGIT, min_size=rows * vocabulary, max_size=rows * vocabulary))
    logits = torch.tensor(entries).view(shape).to(dtype)
    logits[:, data.draw(st.integers(0, vocabulary - 1))] = 1.0  # one token at least is possible
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=rows)), dtype=torch.long)
    found = logit_statistics_torch(logits, tokens)

    wide = logits.double()
    probs = wide.softmax(-1)
    top = wide.sort(-1, descending=True).values
    ratio = logits.float()[torch.arange(len(tokens)), tokens] - logits.float().amax(-1)[: len(tokens)]
    sums, size = wide.shape[1], max(1.0, math.log(wide.shape[1]))
    assert_near(found.log_sum_exp, wide.logsumexp(-1).float(), sums, size)
    assert_near(found.entropy, torch.special.entr(probs).sum(-1).float(), sums, size)
    assert torch.equal(found.argmax, logits.argmax(-1))
    assert torch.equal(found.maximum.double(), top[:, 0])
    assert torch.equal(found.second.double(), top[:, 1] if vocabulary > 1 else torch.full((rows,), -math.inf).double())
    assert torch.equal(found.log_ratio, ratio)
    assert {getattr(found, name).dtype for name in FLOATS} == {torch.float32}


@pytest.mark.parametrize("name", [name for name in cases() if name.startswith(("ties", "masked", "far", "one row"))])
def test_the_reference_against_the_summary(name: str) -> None:
    """The numbers that traces and gates hold already."""
    case = cases()[name]
    found, summary = logit_statistics_torch(case.logits, case.tokens), top_k_statistics(case.logits, 2)
    assert torch.equal(found.argmax, summary.ids[:, 0])
    for got, want in [
        (found.log_sum_exp, summary.log_sum_exp),
        (found.entropy, summary.entropy),
        (found.log_top1, summary.log_probs[:, 0]),
        (found.margin, summary.margin),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=4e-3 if name == "far from 0" else 1e-5)


def test_the_first_of_equal_logits_is_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    found = logit_statistics(logits, TOKENS[:0])
    assert (found.argmax.item(), found.margin.item()) == (1, 0.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_no_distribution_shows(broken: float, dtype: torch.dtype) -> None:
    logits = cases()["float32"].logits.to(dtype, copy=True)
    logits[1, 5] = broken
    found = logit_statistics(logits, TOKENS)
    assert torch.isfinite(found.log_sum_exp).tolist() == [True, False, True, True]
    assert all(getattr(found, name)[1].isnan() for name in FLOATS)
    assert 0 <= found.argmax[1] < logits.shape[1]


def test_a_row_without_a_possible_token_shows() -> None:
    found = logit_statistics(torch.full((1, 9), -math.inf), TOKENS[:1])
    assert found.log_sum_exp.item() == -math.inf


def test_a_token_outside_the_vocabulary_has_no_ratio() -> None:
    found = logit_statistics(torch.zeros(3, 4), torch.tensor([3, 4, -1]))
    assert found.log_ratio.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("logits", "tokens", "message"),
    [
        (torch.zeros(3), TOKENS, "must be \\[rows, vocabulary\\], not \\[3\\]"),
        (torch.zeros(3, 0), TOKENS, "must be \\[rows, vocabulary\\]"),
        (torch.zeros(3, 4, dtype=torch.complex64), TOKENS, "not torch.complex64"),
        (torch.zeros(2, 4), TOKENS, "2 rows of logits go with tokens \\[k <= rows\\], not \\[3\\]"),
        (torch.zeros(3, 4), TOKENS[None], "not \\[1, 3\\]"),
        (torch.zeros(3, 4), TOKENS.float(), "must be integers"),
        (torch.zeros(3, 4), TOKENS.to("meta"), "tokens are on meta"),
    ],
)
def test_what_cannot_be_read_is_refused(logits: torch.Tensor, tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_statistics(logits, tokens)


@pytest.mark.parametrize("name", list(cases()))
def test_rows_are_read_alike_without_tokens(name: str) -> None:
    logits = cases()[name].logits
    found, expected = logit_statistics(logits), logit_statistics(logits, TOKENS[:0])
    assert differences(found, expected, logits.shape[1]) == []
    assert found.log_ratio.shape == (0,)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "masked", "not a number", "tokens outside"])
def test_statistics_row_by_row_are_those_of_all(name: str) -> None:
    """Bit by bit: the decoder reads a row at a time, calibration whole texts."""
    logits = cases()[name].logits
    joined, expected = join_statistics([logit_statistics(row[None]) for row in logits]), logit_statistics(logits)
    for field in fields(LogitStatistics):
        torch.testing.assert_close(
            getattr(joined, field.name), getattr(expected, field.name), rtol=0, atol=0, equal_nan=True
        )


def test_no_rows() -> None:
    found = logit_statistics(torch.zeros(0, 5), TOKENS[:0])
    assert found.entropy.shape == found.log_ratio.shape == (0,)


# --- the kernels against the reference ---


@functools.cache
def interpreted() -> dict[str, list[str]]:
    """Fields in which the interpreted kernels differ from the reference, by case."""
    printed = in_a_new_process(["-W", "ignore", "-m", "tests.kernel_cases"], TRITON_INTERPRET="1")
    found: dict[str, list[str]] = json.loads(printed)
    return found


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", list(cases()))
def test_the_kernels_equal_the_reference(name: str) -> None:
    assert interpreted()[name] == []


@pytest.mark.slow
@needs_triton
def test_the_comparison_sees_other_logits() -> None:
    assert set(interpreted()[CONTROL]) == {field.name for field in fields(LogitStatistics)}


@pytest.mark.parametrize("name", [field.name for field in fields(LogitStatistics)])
def test_the_comparison_sees_a_wrong_value(name: str) -> None:
    case = cases()["float32"]
    found = logit_statistics_torch(case.logits, case.tokens)
    vocabulary = case.logits.shape[1]
    wrong = getattr(found, name).clone()
    wrong.view(-1)[-1] += 1 if wrong.dtype == torch.long else 1e-3
    assert differences(found, found, vocabulary) == []
    assert differences(replace(found, **{name: wrong}), found, vocabulary) == [name]
    assert differences(replace(found, **{name: getattr(found, name).int()}), found, vocabulary) == [name]


# --- what a GPU would be given ---

LOGIT_TYPES = ["bf16", "fp16", "fp32"]
CONTIGUOUS = {"column_stride": 1}
EVEN = ("row_stride", "vocabulary")
"""Multiples of 16."""


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module of the kernels, compiled and not interpreted, with an empty cache."""
    return fresh_module(monkeypatch, tmp_path, "viasd_calib.decoding.kernels.fused")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("logits", LOGIT_TYPES)
def test_blocks_compile_without_a_gpu(fused: Any, logits: str, capability: int) -> None:
    pointers = {"logits": f"*{logits}", "partials": "*fp32", "partial_ids": "*i32"}
    block = WIDEST_BLOCK
    warps = block // fused.LOGITS_PER_WARP
    compiled = compiled_for(capability, fused.read_blocks, pointers, {"BLOCK": block} | CONTIGUOUS, warps, EVEN)
    assert_is_for(compiled, capability)
    loads = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line]
    # Each thread reads its share of the block once, 16 bytes at a time.
    assert len(loads) == block // (32 * warps) * (4 if logits == "fp32" else 2) // 16
    assert all(".v4.b32" in line for line in loads)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("logits", LOGIT_TYPES)
def test_merging_compiles_without_a_gpu(fused: Any, logits: str, capability: int) -> None:
    types = {
        "logits": f"*{logits}",
        "partials": "*fp32",
        "partial_ids": "*i32",
        "tokens": "*i64",
        "floats": "*fp32",
        "argmax": "*i64",
    }
    compiled = compiled_for(capability, fused.merge_blocks, types, {"BLOCKS": 256} | CONTIGUOUS, 1, EVEN)
    assert_is_for(compiled, capability)


@given(rows=st.integers(1, 4096), vocabulary=st.integers(1, 300_000), processors=st.integers(1, 200))
def test_blocks_widen_only_when_the_gpu_is_full(rows: int, vocabulary: int, processors: int) -> None:
    block = block_size(rows, vocabulary, processors)
    assert NARROWEST_BLOCK <= block <= WIDEST_BLOCK
    assert block & (block - 1) == 0
    programs = rows * math.ceil(vocabulary / block)
    assert block == NARROWEST_BLOCK or programs >= PROGRAMS_PER_PROCESSOR * processors


# --- Triton is optional ---

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import viasd_calib.decoding.kernels.fused
import torch
from viasd_calib.decoding.kernels import logit_statistics
print(logit_statistics(torch.tensor([[0.0, 1.0]]), torch.tensor([1])).argmax.item())
"""


@pytest.mark.slow
def test_triton_is_not_needed() -> None:
    assert in_a_new_process(["-c", WITHOUT_TRITON]).strip() == "1"


WITHOUT_NEED = """
import sys, torch
from viasd_calib.decoding.kernels import logit_statistics
logit_statistics(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
print("viasd_calib.decoding.kernels.fused" in sys.modules)
"""


@pytest.mark.slow
def test_the_kernels_are_not_loaded_on_a_cpu() -> None:
    assert in_a_new_process(["-c", WITHOUT_NEED]).strip() == "False"
