"""Decoding by the plan of a spec: which policy a round follows is chosen by the length of the text before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Decoding, Gates, PlanEntry, RoutingSpec


class Planned(Strategy):
    """Three-tier decoding with audit ``strict`` whose policy changes with the context: the text stays q's.

    A round's policy follows from the length of the text before it, so from nothing that the round draws.

    Args:
        rows: the longest text, in tokens, at which each policy is followed, rising; None in the last row.
    """

    name = "three_tier"
    takes_audit = True

    def __init__(self, rows: Sequence[tuple[int | None, ThreeTier]]) -> None:
        self.rows = tuple(rows)

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Planned:
        """One policy at every length: gates and settings alone name no other."""
        return cls([(None, ThreeTier.from_spec(gates, decoding, device))])

    @classmethod
    def of_plan(
        cls, plan: Sequence[PlanEntry], gates: Gates, decoding: Decoding, device: torch.device | str = "cpu"
    ) -> Planned:
        """The policies of a plan, with the gates of its spec."""
        return cls(
            [
                (row.max_context, ThreeTier.from_spec(*row.policy.applied_to(gates, decoding), device=device))
                for row in plan
            ]
        )

    @property
    def asks_slim(self) -> bool:
        """Whether any of the policies may run q'."""
        return any(strategy.asks_slim for _, strategy in self.rows)

    def at(self, length: int) -> ThreeTier:
        """The policy of a round after a text of so many tokens."""
        return next(strategy for bound, strategy in self.rows if bound is None or length <= bound)

    def round(self, session: Session) -> Passes[None]:
        return self.at(session.length).round(session)


def three_tier(spec: RoutingSpec, decoding: Decoding, device: torch.device | str = "cpu") -> Strategy:
    """How a spec's three tiers decode: by its plan where it has one and the audit is ``strict``.

    Args:
        decoding: of the spec, or with another audit.
    """
    if spec.plan is not None and decoding.audit == "strict":
        return Planned.of_plan(spec.plan, spec.gates, decoding, device)
    return ThreeTier.from_spec(spec.gates, decoding, device)
