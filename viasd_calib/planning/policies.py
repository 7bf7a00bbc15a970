"""Policies of exact decoding, one by one and as a table of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.spec import PolicyDrafter

PolicyKind = Literal["no drafting", "speculative", "lookup alone", "three tiers", "three tiers without a draft model"]
"""What a policy is, in a plan's words."""


@dataclass(frozen=True)
class Policy:
    """A policy of greedy exact decoding, as :class:`~viasd_calib.decoding.strategies.three_tier.ThreeTier` follows it.

    Attributes:
        drafter: what drafts in the draft model's place; None for the draft model. Where it is q', or nothing,
            ``draft_length`` is 0.
        draft_length: most tokens drafted a round.
        stop_below: drafting stops where the whole block is kept with less than this probability.
        draft_accept_at: the score at which the draft gate accepts a token unverified; above 1 it never does.
        accept_at: the slim gate's score at which q' decides; above 1 q' is not asked.
        max_pending: most tokens that may wait for q.

    Example:
        >>> Policy("none", draft_length=0).kind, Policy(draft_length=4, accept_at=0.7).kind
        ('no drafting', 'three tiers')
    """

    drafter: PolicyDrafter | None = None
    draft_length: int = 6
    stop_below: float = 0.0
    draft_accept_at: float = NEVER
    accept_at: float = NEVER
    max_pending: int = 12

    @property
    def slim_tier(self) -> bool:
        """Whether q' is asked."""
        return self.accept_at <= 1

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted."""
        return self.draft_length > 0

    @property
    def kind(self) -> PolicyKind:
        """What it is, in a plan's words."""
        if self.slim_tier:
            return "three tiers" if self.drafts and self.drafter is None else "three tiers without a draft model"
        if not self.drafts:
            return "no drafting"
        return "speculative" if self.drafter is None else "lookup alone"


@dataclass(frozen=True)
class PolicyTable:
    """The same of many policies, each [policies]."""

    draft_length: Tensor
    stop_below: Tensor
    draft_accept_at: Tensor
    accept_at: Tensor
    max_pending: Tensor

    @classmethod
    def of(cls, policies: Sequence[Policy]) -> PolicyTable:
        """A table of policies, one at least."""
        return cls(
            torch.tensor([one.draft_length for one in policies]),
            torch.tensor([one.stop_below for one in policies], dtype=torch.float32),
            torch.tensor([one.draft_accept_at for one in policies], dtype=torch.float32),
            torch.tensor([one.accept_at for one in policies], dtype=torch.float32),
            torch.tensor([one.max_pending for one in policies]),
        )

    def at(self, rows: Tensor) -> PolicyTable:
        """Some of them, by their numbers."""
        return PolicyTable(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})
