"""Decoding by the plan of a spec: which policy a round follows, by the text's length and how many texts there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from viasd_calib.decoding.session import Session
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.passes.requests import Passes
from viasd_calib.spec import Decoding, Gates, PlanEntry, RoutingSpec


class PlannedRow(NamedTuple):
    """A policy with where it is followed.

    Attributes:
        max_context: the longest text, in tokens; None for any.
        max_batch: most texts that are decoded together; None for any.
    """

    max_context: int | None
    max_batch: int | None
    strategy: ThreeTier


class Planned(Strategy):
    """Three-tier decoding with audit ``strict`` whose policy changes with context and batch: the text stays q's.

    A round's policy follows from the length of the text before it, and from how many texts are decoded together then:
    so from nothing that the round draws.

    Args:
        rows: by rising ``max_batch``, None in the last ones; of each batch by rising ``max_context``, None in the last.
    """

    name = "three_tier"
    takes_audit = True

    def __init__(self, rows: Sequence[PlannedRow]) -> None:
        self.rows = tuple(rows)

    @classmethod
    def from_spec(cls, gates: Gates, decoding: Decoding, device: torch.device | str = "cpu") -> Planned:
        """One policy everywhere: gates and settings alone name no other."""
        return cls([PlannedRow(None, None, ThreeTier.from_spec(gates, decoding, device))])

    @classmethod
    def of_plan(
        cls, plan: Sequence[PlanEntry], gates: Gates, decoding: Decoding, device: torch.device | str = "cpu"
    ) -> Planned:
        """The policies of a plan, with the gates of its spec."""
        return cls(
            [
                PlannedRow(
                    row.max_context,
                    row.max_batch,
                    ThreeTier.from_spec(*row.policy.applied_to(gates, decoding), device=device),
                )
                for row in plan
            ]
        )

    @property
    def asks_slim(self) -> bool:
        """Whether any of the policies may run q'."""
        return any(row.strategy.asks_slim for row in self.rows)

    def at(self, length: int, together: int = 1) -> ThreeTier:
        """The policy of a round after a text of so many tokens, where so many texts are decoded together."""
        return next(
            row.strategy for row in self.rows if _within(together, row.max_batch) and _within(length, row.max_context)
        )

    def round(self, session: Session) -> Passes[None]:
        return self.at(session.length, session.together).round(session)


def _within(value: int, bound: int | None) -> bool:
    return bound is None or value <= bound


def three_tier(spec: RoutingSpec, decoding: Decoding, device: torch.device | str = "cpu") -> Strategy:
    """How a spec's three tiers decode: by its plan where it has one and the audit is ``strict``.

    Args:
        decoding: of the spec, or with another audit.
    """
    if spec.plan is not None and decoding.audit == "strict":
        return Planned.of_plan(spec.plan, spec.gates, decoding, device)
    return ThreeTier.from_spec(spec.gates, decoding, device)
