"""The fastest policy of each kind: a whole grid of policies, replayed once and priced at each context.

The replay is cheap enough for every combination to be tried, so that nothing is left to a search's luck. All speeds are
*simulated*, and propose which policies are worth decoding for real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from viasd_calib.decoding.policies import Policy, PolicyKind
from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.planning.costs import ReplayCosts, simulated_seconds
from viasd_calib.planning.replay import ReplayCounts, replay
from viasd_calib.planning.traced import ReplayTable
from viasd_calib.spec import PolicyDrafter


@dataclass(frozen=True)
class PolicyGrid:
    """What is tried, in every combination.

    Attributes:
        draft_lengths: most tokens drafted a round.
        stops: bounds below which drafting stops; for the draft model alone, whose gate they are of.
        draft_bounds: scores at which the draft gate accepts a token unverified; above 1 for never.
        thresholds: scores at which q' decides.
        pending: most tokens that may wait for q.
    """

    draft_lengths: Sequence[int] = (1, 2, 3, 4, 6, 8)
    stops: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8)
    draft_bounds: Sequence[float] = (0.9, NEVER)
    thresholds: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.85)
    pending: Sequence[int] = (6, 12)

    def policies(self, drafters: Sequence[PolicyDrafter | None], *, slim_tier: bool) -> list[Policy]:
        """Every policy that drafts with one of ``drafters``, no drafting among them.

        Args:
            drafters: None for the draft model.
            slim_tier: whether policies that ask q' are wanted.
        """
        found = [Policy("none", draft_length=0)]
        for drafter in drafters:
            if drafter == "slim":
                found += self._with_slim("slim", 0, 0.0) if slim_tier else ()
                continue
            for length, stop in product(self.draft_lengths, self.stops if drafter is None else (0.0,)):
                found.append(Policy(drafter, length, stop))
                found += self._with_slim(drafter, length, stop) if slim_tier else ()
        return found

    def _with_slim(self, drafter: PolicyDrafter | None, length: int, stop: float) -> Iterator[Policy]:
        gated = self.draft_bounds if drafter is None else (NEVER,)
        for draft_accept_at, threshold, pending in product(gated, self.thresholds, self.pending):
            if pending > length:  # else q' would never be asked
                yield Policy(drafter, length, stop, draft_accept_at, threshold, pending)

    @property
    def widest(self) -> int:
        """The widest pass that any of them makes."""
        return max(self.pending) + max(self.draft_lengths) + 1


@dataclass(frozen=True)
class Predicted:
    """A policy with what a replay expects of it; all *simulated*.

    Attributes:
        seconds: a token.
        full: passes of q a token.
        slim: passes of q' a token.
        draft: draft steps a token.
        full_width: mean width of the passes of q.
        slim_width: of those of q'; 0 where there is none.
    """

    policy: Policy
    seconds: float
    full: float
    slim: float
    draft: float
    full_width: float
    slim_width: float


@dataclass(frozen=True)
class Predictions:
    """The fastest policies at one context, *simulated*.

    Attributes:
        every: the fastest of each kind and drafter, one or several of it.
    """

    costs: ReplayCosts
    every: Sequence[Predicted]

    @property
    def by_kind(self) -> Mapping[PolicyKind, Predicted]:
        """The fastest of each kind."""
        found: dict[PolicyKind, Predicted] = {}
        for one in sorted(self.every, key=_seconds):
            found.setdefault(one.policy.kind, one)
        return found

    @property
    def fastest(self) -> Predicted:
        """Of all; of equally fast ones the simplest kind."""
        return min(self.by_kind.values(), key=lambda one: one.seconds)

    @property
    def with_slim(self) -> Predicted | None:
        """The fastest that asks q'; None where none was tried."""
        return min((one for one in self.by_kind.values() if one.policy.slim_tier), key=_seconds, default=None)

    @property
    def without_slim(self) -> Predicted:
        """The fastest that does not ask q'."""
        return min((one for one in self.by_kind.values() if not one.policy.slim_tier), key=_seconds)

    @property
    def drafted(self) -> Predicted | None:
        """The fastest that drafts and does not ask q'; None where none was tried."""
        found = (one for one in self.by_kind.values() if not one.policy.slim_tier and one.policy.drafts)
        return min(found, key=_seconds, default=None)

    def speedup(self, one: Predicted) -> float:
        """Over decoding without drafting."""
        return self.by_kind["no drafting"].seconds / one.seconds


def _seconds(one: Predicted) -> float:
    return one.seconds


def search(
    grid: PolicyGrid,
    texts: Mapping[PolicyDrafter | None, ReplayTable],
    costs: Sequence[ReplayCosts],
    each: Mapping[PolicyKind, int] | None = None,
) -> list[Predictions]:
    """The fastest policies of each kind and drafter at each context, *simulated*.

    Args:
        grid: what is tried.
        texts: by what drafts on them; None for the draft model. With what q' said, policies that ask it are tried, and
            those without any drafter among them.
        costs: of each context.
        each: how many of a kind and drafter are wanted, where not one. They differ in the score at which q' decides, or
            in the stop bound where it is not asked: neighbours in the grid would be about the same policy.

    Returns:
        One for each of ``costs``.
    """
    found: list[list[Predicted]] = [[] for _ in costs]
    for number, (drafter, table) in enumerate(texts.items()):
        slim_tier = table.slim is not None
        drafters: list[PolicyDrafter | None] = [drafter]
        if number == 0:  # what drafts nothing reads any of the tables
            drafters.append("slim")
        policies = grid.policies(drafters, slim_tier=slim_tier)
        counts = replay(policies, table)
        for predicted, one in zip(found, costs, strict=True):
            seconds = simulated_seconds(counts, one).tolist()
            rows = _fastest_rows(policies, seconds, each or {})
            predicted += [_predicted(policies[row], row, seconds[row], counts) for row in rows]
    return [Predictions(one, _first_of_each_policy(predicted)) for one, predicted in zip(costs, found, strict=True)]


def _fastest_rows(policies: Sequence[Policy], seconds: Sequence[float], each: Mapping[PolicyKind, int]) -> list[int]:
    """Numbers of the fastest policies of each kind and drafter, of equally fast ones the first."""
    kinds: dict[tuple[PolicyKind, PolicyDrafter | None], dict[float, int]] = {}
    for row in sorted(range(len(policies)), key=seconds.__getitem__):
        policy = policies[row]
        differing = policy.accept_at if policy.slim_tier else policy.stop_below
        kinds.setdefault((policy.kind, policy.drafter), {}).setdefault(differing, row)
    return [row for (kind, _), rows in kinds.items() for row in [*rows.values()][: each.get(kind, 1)]]


def _first_of_each_policy(predicted: Sequence[Predicted]) -> list[Predicted]:
    """Each policy once: no drafting is replayed beside every drafter."""
    found: dict[Policy, Predicted] = {}
    for one in predicted:
        found.setdefault(one.policy, one)
    return [*found.values()]


def _predicted(policy: Policy, row: int, seconds: float, counts: ReplayCounts) -> Predicted:
    return Predicted(
        policy,
        seconds,
        float(counts.full_per_token[row]),
        float(counts.slim_per_token[row]),
        float(counts.draft_per_token[row]),
        float(counts.mean_width(counts.full)[row]),
        float(counts.mean_width(counts.slim)[row]),
    )
