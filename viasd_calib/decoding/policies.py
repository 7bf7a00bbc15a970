"""A policy of exact decoding by its name and numbers, as searches and plans speak of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from viasd_calib.decoding.strategies.three_tier import NEVER
from viasd_calib.spec import PlannedPolicy, PolicyDrafter

PolicyKind = Literal["no drafting", "speculative", "lookup alone", "three tiers", "three tiers without a draft model"]
"""What a policy is, in words."""

WITHOUT_SLIM: dict[PolicyDrafter | None, PolicyKind] = {
    None: "speculative",
    "lookup": "lookup alone",
    "none": "no drafting",
}
"""Kinds that do not ask q', by what drafts; None for the draft model."""


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
        drafting_pays_at: the least share of a text's drafted tokens that must be kept for drafting to go on unreduced;
            0 for always.

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
    drafting_pays_at: float = 0.0

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
        """What it is, in words."""
        if self.slim_tier:
            return "three tiers" if self.drafts and self.drafter is None else "three tiers without a draft model"
        if not self.drafts:
            return "no drafting"
        return WITHOUT_SLIM[self.drafter]

    @property
    def words(self) -> str:
        """What it is made of, in a few words, for a cell of a table.

        Example:
            >>> Policy(draft_length=8, stop_below=0.4).words, Policy("none", draft_length=0).words
            ('draft 8, stop 0.4', '-')
        """
        parts = [f"draft {self.draft_length}"] if self.drafts else []
        parts += [f"stop {self.stop_below:g}"] if self.stop_below else []
        parts += [f"gate {self.draft_accept_at:g}"] if self.draft_accept_at <= 1 else []
        parts += [f"slim {self.accept_at:g}, pending {self.max_pending}"] if self.slim_tier else []
        return ", ".join(parts) or "-"

    def planned(self) -> PlannedPolicy:
        """The same as a spec names it."""
        return PlannedPolicy(
            drafter=self.drafter,
            draft_length=self.draft_length,
            max_pending=self.max_pending,
            draft_stop_below=self.stop_below,
            draft_accept_at=self.draft_accept_at,
            accept_at=self.accept_at,
            drafting_pays_at=self.drafting_pays_at or None,
        )
