from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from viasd_calib.decoding.acceptance import (
    SlimMasks,
    accept_by_draft_gate,
    accept_by_ratio,
    accept_by_score,
    accept_greedy,
    audit,
    leading_true,
)
from viasd_calib.decoding.slim_decision import SlimDecision, decide_greedy

# Exact in float32, so that the plain rule and the tensors compare the same numbers.
SCORES = st.integers(0, 64).map(lambda n: n / 64)
BOUNDS = st.integers(1, 65).map(lambda n: n / 64)


def decide(masks: SlimMasks) -> SlimDecision:
    """Where the tokens of q' are of no importance."""
    return decide_greedy(masks, torch.zeros(len(masks.regenerate), 2), gated=0)


def plain_leading(flags: list[bool]) -> int:
    count = 0
    for flag in flags:
        if not flag:
            break
        count += 1
    return count


@given(flags=st.lists(st.booleans()))
def test_leading_true(flags: list[bool]) -> None:
    assert leading_true(torch.tensor(flags, dtype=torch.bool)).item() == plain_leading(flags)


@given(scores=st.lists(SCORES), bound=BOUNDS)
def test_accept_by_draft(scores: list[float], bound: float) -> None:
    expected = plain_leading([score >= bound for score in scores])
    assert accept_by_draft_gate(torch.tensor(scores), bound).item() == expected


@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2))))
def test_accept_greedy(pairs: list[tuple[int, int]]) -> None:
    drafted = torch.tensor([one for one, _ in pairs], dtype=torch.long)
    choices = torch.tensor([other for _, other in pairs], dtype=torch.long)
    assert accept_greedy(drafted, choices).item() == plain_leading([one == other for one, other in pairs])


@given(
    accept=st.lists(SCORES, max_size=6), own=st.lists(SCORES, min_size=7, max_size=7), bounds=st.tuples(BOUNDS, BOUNDS)
)
def test_the_calibrated_rule(accept: list[float], own: list[float], bounds: tuple[float, float]) -> None:
    accept_at, regenerate_at = bounds
    own = own[: len(accept) + 1]
    decision = decide(accept_by_score(torch.tensor(accept), torch.tensor(own), accept_at, regenerate_at))
    kept = 0
    while kept < len(accept) and accept[kept] >= accept_at:
        kept += 1
    assert decision.accepted.item() == kept
    assert decision.regenerate.item() == (own[kept] >= regenerate_at)


@given(ratios=st.lists(st.floats(0.01, 1), max_size=6), bounds=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_the_ratio_rule(ratios: list[float], bounds: tuple[float, float]) -> None:
    escalate_below, accept_at = sorted(bounds)
    assume(all(not math.isclose(r, bound, rel_tol=1e-5) for r in ratios for bound in bounds))
    decision = decide(accept_by_ratio(torch.tensor(ratios).log(), accept_at, escalate_below))
    kept = 0
    while kept < len(ratios) and ratios[kept] >= accept_at:
        kept += 1
    assert decision.accepted.item() == kept
    assert decision.regenerate.item() == (kept < len(ratios) and ratios[kept] >= escalate_below)


@st.composite
def audits(draw: st.DrawFn) -> tuple[list[int], list[list[float]]]:
    """Pending tokens, and q's logits at their places; no two logits of a place are equal."""
    vocab = draw(st.integers(2, 5))
    count = draw(st.integers(0, 6))
    row = st.lists(st.integers(-12, 12), min_size=vocab, max_size=vocab, unique=True)
    logits = [[value / 4 for value in draw(row)] for _ in range(count)]
    return [draw(st.integers(0, vocab - 1)) for _ in range(count)], logits


def run_audit(pending: list[int], logits: list[list[float]], kind: str, tolerance: float) -> int:
    rows = torch.tensor(logits) if logits else torch.empty(0, 3)
    tokens = torch.tensor(pending, dtype=torch.long)
    return int(audit(tokens, rows, rows.argmax(-1), kind, tolerance))  # type: ignore[arg-type]


@given(case=audits())
def test_strict_audit_keeps_choices_of_q(case: tuple[list[int], list[list[float]]]) -> None:
    pending, logits = case
    flags = [token == max(range(len(row)), key=row.__getitem__) for token, row in zip(pending, logits, strict=True)]
    assert run_audit(pending, logits, "strict", 0.5) == plain_leading(flags)


@given(case=audits(), tolerance=st.floats(0.01, 0.99))
def test_tolerant_audit_keeps_what_q_finds_likely_enough(
    case: tuple[list[int], list[list[float]]], tolerance: float
) -> None:
    pending, logits = case
    ratios = [math.exp(row[token] - max(row)) for token, row in zip(pending, logits, strict=True)]
    assume(all(not math.isclose(ratio, tolerance, rel_tol=1e-5) for ratio in ratios))
    assert run_audit(pending, logits, "tolerant", tolerance) == plain_leading([r >= tolerance for r in ratios])


@given(case=audits())
def test_tolerance_of_one_is_strict(case: tuple[list[int], list[list[float]]]) -> None:
    assert run_audit(*case, "tolerant", 1.0) == run_audit(*case, "strict", 0.5)


@given(case=audits(), tolerances=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_more_tolerance_keeps_no_fewer(
    case: tuple[list[int], list[list[float]]], tolerances: tuple[float, float]
) -> None:
    low, high = sorted(tolerances)
    assert run_audit(*case, "tolerant", low) >= run_audit(*case, "tolerant", high)


@given(case=audits())
def test_no_audit_keeps_all(case: tuple[list[int], list[list[float]]]) -> None:
    assert run_audit(*case, "off", 0.5) == len(case[0])


@pytest.mark.parametrize("kind", ["strict", "tolerant"])
def test_not_a_number_keeps_nothing(kind: str) -> None:
    assert run_audit([1, 1], [[math.nan] * 3] * 2, kind, 0.5) == 0
