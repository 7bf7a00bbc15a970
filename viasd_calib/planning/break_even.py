"""Which share of drafted tokens must be kept for drafting to pay, by what passes and draft steps cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

from viasd_calib.decoding.policies import Policy
from viasd_calib.planning.costs import ReplayCosts
from viasd_calib.profiling.profile import TierName

LEAST = 0.01
"""The least bound: where a drafted token costs nothing that was measured, one in a hundred must still be kept."""


def drafting_pays_at(policy: Policy, costs: ReplayCosts) -> float:
    """The share at which a kept token saves what drafted ones cost; 0 where none is drafted, or no share suffices.

    A drafted token costs a draft step and makes a pass wider. A kept one saves a pass over one token: of q', where the
    policy asks it, else of q. Looked-up tokens take no step; those of a combined drafter are counted as the draft
    model's.

    Example:
        >>> costs = ReplayCosts(128, draft_step=0.1, full=[1.0, 1.1, 1.2], slim=[0.5, 0.5, 0.5])
        >>> round(drafting_pays_at(Policy(draft_length=2), costs), 3)
        0.2
        >>> round(drafting_pays_at(Policy("lookup", draft_length=2), costs), 3)
        0.1
    """
    if not policy.drafts:
        return 0.0
    tier: TierName = "slim" if policy.slim_tier else "full"
    one, whole = costs.pass_seconds(tier, 1), costs.pass_seconds(tier, policy.draft_length + 1)
    step = 0.0 if policy.drafter == "lookup" else costs.draft_step
    share = (step + max(whole - one, 0.0) / policy.draft_length) / one
    return max(share, LEAST) if share < 1 else 0.0


def watched(policies: Sequence[Policy], costs: Sequence[ReplayCosts]) -> list[Policy]:
    """The policies of a plan with their bounds, to two digits; one that follows itself has the lowest of its bounds.

    Args:
        costs: at the context of each.
    """
    bounds = [round(drafting_pays_at(policy, own), 2) for policy, own in zip(policies, costs, strict=True)]
    found: list[Policy] = []
    for policy, run in groupby(zip(policies, bounds, strict=True), key=itemgetter(0)):
        shares = [bound for _, bound in run]
        found += [replace(policy, drafting_pays_at=min(shares))] * len(shares)
    return found
