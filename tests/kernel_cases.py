"""Logits that kernels may stumble over, and the comparison of a kernel with its reference.

Run as a program it compares the Triton kernels, interpreted on the CPU, and prints one JSON object: the
fields that differ, by case. Triton decides at import whether it interprets, so this needs its own process,
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from viasd_calib.decoding.kernels import LogitStatistics, logit_statistics_torch

INF = math.inf
CONTROL = "control: the kernel is given other logits"


@dataclass(frozen=True)
class Case:
    """Logits [rows, vocabulary], tokens [k] at the leading rows, and how many logits a program reads."""

    logits: Tensor
    tokens: Tensor
    block: int


def noise(rows: int, vocabulary: int, scale: float = 4.0) -> Tensor:
    """The same logits at every call."""
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows + vocabulary)) * scale


def with_entries(logits: Tensor, entries: dict[tuple[int, int], float]) -> Tensor:
    """A copy of ``logits`` with some entries set."""
    changed = logits.clone()
    for place, value in entries.items():
        changed[place] = value
    return changed


def cases() -> dict[str, Case]:
    """Every case by its name."""
    few = torch.tensor([1, 2, 3])
    plain = noise(4, 1000)
    ties = noise(4, 333).round()
    masked = plain.where(plain > 0, -INF)
    apart = torch.full((4, 300), -INF)
    apart[:, 280:] = noise(4, 20)
    lowest = torch.full((4, 300), torch.finfo(torch.float32).min)
    lowest[:, 70:75] = noise(4, 5)
    flat = torch.zeros(2, 999)
    return {
        "float32": Case(plain, few, 128),
        "bfloat16": Case(plain.bfloat16(), few, 128),
        "float16": Case(plain.half(), few, 128),
        "float64": Case(plain.double() * (1 + 1e-12), few, 128),
        "one block": Case(plain, few, 1024),
        "vocabulary of one": Case(noise(3, 1), torch.tensor([0, 0]), 16),
        "vocabulary of two": Case(noise(3, 2), torch.tensor([0, 1]), 16),
        "odd vocabulary": Case(noise(3, 997), few, 64),
        "odd vocabulary in bfloat16": Case(noise(2, 5003).bfloat16(), few[:2], 512),
        "one logit in the last block": Case(noise(3, 129), torch.tensor([128, 128, 128]), 128),
        "one row": Case(noise(1, 4099), few[:1], 512),
        "row stride": Case(noise(6, 500)[::2, 7:130], few, 32),
        "column stride": Case(noise(300, 5).T[:3], few, 64),
        "same row thrice": Case(noise(1, 200).expand(3, 200), few, 64),
        "ties": Case(ties, ties.argmax(-1), 32),
        "ties in bfloat16": Case(noise(4, 700).bfloat16(), few, 64),
        "all equal": Case(flat, torch.tensor([998, 5]), 64),
        "second in another block": Case(with_entries(flat, {(0, 9): 3, (0, 900): 2, (1, 900): 3}), few[:2], 64),
        "masked": Case(masked, few, 64),
        "masked in bfloat16": Case(masked.bfloat16(), few, 64),
        "leading blocks all -inf": Case(apart, torch.tensor([0, 281, 299, 7]), 64),
        "one token possible": Case(with_entries(torch.full((2, 100), -INF), {(0, 3): 1, (1, 99): 1}), few[:2], 32),
        "masked by the lowest float": Case(lowest, torch.tensor([0, 70, 74, 299]), 64),
        "nothing possible": Case(torch.full((2, 100), -INF), few[:2], 32),
        "not a number": Case(with_entries(plain, {(1, 500): math.nan}), few, 128),
        "not a number in bfloat16": Case(with_entries(plain, {(0, 0): math.nan}).bfloat16(), few, 128),
        "all not a number": Case(plain * math.nan, few, 128),
        "plus infinity": Case(with_entries(plain, {(2, 10): INF, (3, 10): INF, (3, 900): INF}), few, 128),
        "infinity and not a number": Case(with_entries(plain, {(0, 10): INF, (0, 11): math.nan}), few, 128),
        "large logits": Case(plain * 1000, few, 128),
        "far from 0": Case(plain + 20000, few, 128),
        "most likely tokens": Case(plain, plain.argmax(-1), 256),
        "no tokens": Case(plain, few[:0], 128),
        "tokens of 32 bits": Case(plain, few.int(), 128),
        "strided tokens": Case(plain, torch.arange(6)[::2], 128),
        "tokens outside": Case(plain, torch.tensor([5, -1, 1000, 2**40]), 128),
    }


def differences(reading: LogitStatistics, expected: LogitStatistics, vocabulary: int) -> list[str]:
    """The fields in which a reading is not the expected one.

    Sums of thousands of terms may differ in their last bits, all else is exact; a row that is no
    distribution has any ``argmax`` within the vocabulary.
    """
    proper = ~expected.log_sum_exp.isnan()
    found = []
    for field in fields(LogitStatistics):
        got, want = getattr(reading, field.name), getattr(expected, field.name)
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            found.append(field.name)
        elif field.name == "argmax":
            inside = (got >= 0) & (got < vocabulary)
            if not (inside.all() and torch.equal(got[proper], want[proper])):
                found.append(field.name)
        else:
            tolerance = 1e-5 if field.name in ("log_sum_exp", "entropy") else 0.0
            if not torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True):
                found.append(field.name)
    return found


def compare(case: Case, seen: Tensor) -> list[str]:
    """The fields in which the fused kernels, given the logits ``seen``, differ from the reference on the case."""
    from viasd_calib.decoding.kernels.fused import logit_statistics_fused

    expected = logit_statistics_torch(case.logits, case.tokens)
    reading = logit_statistics_fused(seen, case.tokens, case.block)
    return differences(reading, expected, case.logits.shape[1])


def control() -> list[str]:
    """What the comparison finds where the kernels are given rows without their largest logit."""
    case = cases()["float32"]
    case = replace(case, logits=with_entries(case.logits, {(0, 3): 50.0}), tokens=torch.tensor([3]))
    return compare(case, with_entries(case.logits, {(0, 3): 0.0}))


if __name__ == "__main__":
    found = {name: compare(case, case.logits) for name, case in cases().items()}
    print(json.dumps({**found, CONTROL: control()}))
