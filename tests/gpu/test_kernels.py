"""The Triton kernels on the device, compiled for it, against their reference in torch."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from tests.kernel_cases import cases, with_entries
from tests.rounding import rounding
from viasd_calib.decoding.kernels import LogitStatistics, logit_statistics, logit_statistics_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

SUMS = ("log_sum_exp", "entropy")
"""Fields that add up; all others are taken from the logits as they are."""

LONGEST_SUM = 256
"""Numbers that are added one after the other on the way to a sum: threads add up shares of their own, then in pairs."""

VOCABULARIES = {"cpu": [999], "cuda": [49_152, 151_936, 256_000]}


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device with the strides and the offset that it had."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((count,), (1,), 0).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_equal(found: LogitStatistics, wanted: LogitStatistics, vocabulary: int) -> float:
    """Integers and logits exactly, sums up to rounding; returns how far sums lie apart at most."""
    proper, apart = ~wanted.log_sum_exp.isnan(), 0.0
    for name in (field.name for field in fields(LogitStatistics)):
        got, want = getattr(found, name).cpu(), getattr(wanted, name).cpu()
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        if name == "argmax":
            assert ((got >= 0) & (got < vocabulary)).all()
            assert torch.equal(got[proper], want[proper])
            continue
        bound = 0.0
        if name in SUMS:
            bound = rounding(got, want, sums=min(vocabulary, LONGEST_SUM), size=max(1.0, math.log(vocabulary)))
            apart = max(apart, _widest(got, want))
        torch.testing.assert_close(got, want, rtol=0, atol=bound, equal_nan=True)
    return apart


def _widest(got: Tensor, want: Tensor) -> float:
    differences = (got - want)[want.isfinite()].abs()
    return float(differences.max()) if differences.numel() else 0.0


@pytest.mark.parametrize("name", list(cases()))
def test_the_kernels_equal_the_reference(
    name: str, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    from viasd_calib.decoding.kernels.fused import logit_statistics_fused

    case = cases()[name]
    found = logit_statistics_fused(placed(case.logits, device), placed(case.tokens, device), case.block)
    wanted = logit_statistics_torch(case.logits, case.tokens)
    record_property("widest_difference", assert_equal(found, wanted, case.logits.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_decoders_size(
    dtype: torch.dtype, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """One row to sixteen of real vocabularies, by what the decoder calls: it chooses kernels and blocks."""
    for vocabulary in VOCABULARIES[device.type]:
        for rows in (1, 4, 16):
            generator = torch.Generator().manual_seed(rows)
            logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
            tokens = torch.arange(rows)
            found = logit_statistics(logits.to(device), tokens.to(device))
            apart = assert_equal(found, logit_statistics_torch(logits, tokens), vocabulary)
            record_property(f"widest_difference_{rows}x{vocabulary}", apart)


def test_the_comparison_sees_other_logits(device: torch.device) -> None:
    from viasd_calib.decoding.kernels.fused import logit_statistics_fused

    case = cases()["float32"]
    seen = placed(with_entries(case.logits, {(0, 3): 50.0}), device)
    wanted = logit_statistics_torch(case.logits, case.tokens)
    with pytest.raises(AssertionError):
        assert_equal(logit_statistics_fused(seen, case.tokens.to(device), case.block), wanted, case.logits.shape[1])
