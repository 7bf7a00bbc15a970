"""The rows of a plan: from predictions at several contexts and batches, and what decoding has shown, to a table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from math import sqrt
from typing import TypeVar

from viasd_calib.decoding.policies import Policy, PolicyKind
from viasd_calib.errors import PlanningError
from viasd_calib.planning.search import Predicted, Predictions
from viasd_calib.spec import Decoding, Gates, PlanEntry, PolicyDrafter

Found = TypeVar("Found")

DRAFTING_NOTHING: tuple[PolicyDrafter, ...] = ("slim", "none")


def best_group(found: Sequence[Predictions], kinds: Sequence[Collection[PolicyKind]]) -> list[Predicted]:
    """The fastest policy at each context and batch that drafts with the draft model, or with lookup, or nothing.

    A text has one drafter, so that the one with the fewer *simulated* seconds a token over all of them is taken.

    Args:
        kinds: that may be planned there, for each of ``found``; no drafting among them.
    """

    def rows(drafter: PolicyDrafter | None) -> list[Predicted]:
        allowed = (drafter, *DRAFTING_NOTHING)
        return [_fastest(one, allowed, own) for one, own in zip(found, kinds, strict=True)]

    return min((rows(None), rows("lookup")), key=lambda group: sum(one.seconds for one in group))


def _fastest(
    found: Predictions, drafters: Collection[PolicyDrafter | None], kinds: Collection[PolicyKind]
) -> Predicted:
    allowed = (one for one in found.every if one.policy.drafter in drafters and one.policy.kind in kinds)
    return min(allowed, key=lambda one: one.seconds)


def plan_rows(contexts: Sequence[int], policies: Sequence[Policy]) -> list[PlanEntry]:
    """Rows with a bound half way, by ratio, between contexts whose policies differ; the last is for any context.

    Args:
        contexts: rising, one at least.
        policies: at each.

    Example:
        >>> fast, slow = Policy(draft_length=4), Policy("none", draft_length=0)
        >>> [row.max_context for row in plan_rows([100, 200, 400], [fast, fast, slow])]
        [282, None]
    """
    if not contexts or [*contexts] != sorted(set(contexts)):
        raise PlanningError(f"contexts are {[*contexts]}; give them in rising order, each once")
    return [PlanEntry(max_context=bound, policy=policy.planned()) for bound, policy in _ranges(contexts, policies)]


def rows_by_batch(batches: Sequence[int], groups: Sequence[Sequence[PlanEntry]]) -> list[PlanEntry]:
    """The rows of each batch size, with a bound half way, by ratio, to the next one whose rows differ.

    Args:
        batches: rising, one at least.
        groups: rows by context, at each.

    Example:
        >>> fast, slow = (plan_rows([100], [one]) for one in (Policy(draft_length=4), Policy("none", draft_length=0)))
        >>> [(row.max_batch, row.policy.draft_length) for row in rows_by_batch([1, 4, 16], [fast, fast, slow])]
        [(8, 4), (None, 0)]
    """
    ranges = _ranges(batches, [[*group] for group in groups])
    return [row.model_copy(update={"max_batch": bound}) for bound, group in ranges for row in group]


def _ranges(places: Sequence[int], found: Sequence[Found]) -> Iterator[tuple[int | None, Found]]:
    """What was found at rising places, neighbours that are equal once, each with the bound up to which it holds.

    That is half way, by ratio, to the next place where something else was found; None for the last.
    """
    for number, one in enumerate(found):
        if number == len(found) - 1:
            yield None, one
        elif found[number + 1] != one:
            yield half_ways(places)[number], one


def half_ways(places: Sequence[int]) -> list[int]:
    """The bounds between rising places, half way by ratio: up to each, what lies there is of the lower of its two.

    Example:
        >>> half_ways([100, 200, 800])
        [141, 400]
    """
    return [int(sqrt(lower * higher)) for lower, higher in pairwise(places)]


def nearest(places: Sequence[int], value: int) -> int:
    """The one of rising places that is nearest by ratio, within the bounds that a plan's rows have between them.

    Example:
        >>> [nearest([100, 200, 800], length) for length in (1, 141, 142, 400, 5000)]
        [100, 100, 200, 200, 800]
    """
    return places[bisect_left(half_ways(places), value)]


def base_of(rows: Sequence[PlanEntry], gates: Gates, decoding: Decoding) -> tuple[Gates, Decoding]:
    """Gates and settings of a spec beside a plan: those of its first row that drafts, or of the last one."""
    drafting = [row.policy for row in rows if row.policy.drafter not in DRAFTING_NOTHING]
    return (drafting[0] if drafting else rows[-1].policy).applied_to(gates, decoding)
