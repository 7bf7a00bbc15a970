"""The rows of a plan: from predictions at several contexts, and what decoding has shown, to policies by context."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import sqrt

from viasd_calib.decoding.policies import Policy, PolicyKind
from viasd_calib.errors import PlanningError
from viasd_calib.planning.search import Predicted, Predictions
from viasd_calib.spec import Decoding, Gates, PlanEntry, PolicyDrafter

DRAFTING_NOTHING: tuple[PolicyDrafter, ...] = ("slim", "none")


def best_group(found: Sequence[Predictions], kinds: Collection[PolicyKind]) -> list[Predicted]:
    """The fastest policy at each context that drafts with the draft model, or with lookup, or nothing.

    A text has one drafter, so that the one with the fewer *simulated* seconds a token over all contexts is taken.

    Args:
        kinds: that may be planned; no drafting among them.
    """

    def rows(drafter: PolicyDrafter | None) -> list[Predicted]:
        allowed = (drafter, *DRAFTING_NOTHING)
        return [_fastest(one, lambda it: it.policy.drafter in allowed and it.policy.kind in kinds) for one in found]

    return min((rows(None), rows("lookup")), key=lambda group: sum(one.seconds for one in group))


def _fastest(found: Predictions, allowed: Callable[[Predicted], bool]) -> Predicted:
    return min((one for one in found.every if allowed(one)), key=lambda one: one.seconds)


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
    rows: list[PlanEntry] = []
    for number, policy in enumerate(policies):
        last = number == len(policies) - 1
        if not last and policies[number + 1] == policy:
            continue
        bound = None if last else int(sqrt(contexts[number] * contexts[number + 1]))
        rows.append(PlanEntry(max_context=bound, policy=policy.planned()))
    return rows


def base_of(rows: Sequence[PlanEntry], gates: Gates, decoding: Decoding) -> tuple[Gates, Decoding]:
    """Gates and settings of a spec beside a plan: those of its first row that drafts, or of the last one."""
    drafting = [row.policy for row in rows if row.policy.drafter not in DRAFTING_NOTHING]
    return (drafting[0] if drafting else rows[-1].policy).applied_to(gates, decoding)
