"""The plan of a spec: which policy of exact decoding at which context length, and how many texts together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated

from pydantic import Field

from viasd_calib.schema.base import SpecModel
from viasd_calib.schema.decoding import Decoding, PolicyDrafter
from viasd_calib.schema.gates import Gates


class PlannedPolicy(SpecModel):
    """Bounds and settings in place of those of ``gates`` and ``decoding``; the gates themselves stay."""

    drafter: PolicyDrafter | None = Field(
        None, description="as decoding.drafter: that one, or slim or none, which draft nothing"
    )
    draft_length: int = Field(ge=0, le=64, description="most tokens drafted a round")
    max_pending: int = Field(ge=0, le=256, description="most tokens that may wait for the full verifier")
    draft_stop_below: float = Field(0.0, ge=0, le=1, description="as gates.draft_stop_below")
    draft_accept_at: float = Field(1.01, gt=0, description="as gates.draft_accept_at; above 1 for never")
    accept_at: float = Field(
        1.01, gt=0, description="as gates.accept_at and regenerate_at; above 1 the slim verifier is not run"
    )

    drafting_pays_at: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="as decoding.drafting_pays_at, and in its place"
    )

    @property
    def slim_tier(self) -> bool:
        """Whether q' may decide anything."""
        return self.accept_at <= 1

    def applied_to(self, gates: Gates, decoding: Decoding) -> tuple[Gates, Decoding]:
        """Gates and settings of a spec as this policy has them."""
        bounds = {
            "draft_stop_below": self.draft_stop_below,
            "draft_accept_at": self.draft_accept_at,
            "accept_at": self.accept_at,
            "regenerate_at": self.accept_at,
        }
        names = ("drafter", "draft_length", "max_pending", "drafting_pays_at")
        settings = {name: getattr(self, name) for name in names}
        return gates.model_copy(update=bounds), decoding.model_copy(update=settings)


class PlanEntry(SpecModel):
    """A row of the plan."""

    max_context: int | None = Field(
        ge=1,
        description="longest text, in tokens, whose next round is decoded so; null in the last row of a batch, for any",
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        description="most texts that are decoded together where rounds are decoded so, those that have ended not "
        "counted; null in the last rows, for any",
    )
    policy: PlannedPolicy = Field(description="how it is decoded")


def by_batch(plan: Sequence[PlanEntry]) -> list[tuple[int | None, list[PlanEntry]]]:
    """Rows of a plan that follow each other with the same ``max_batch``, with it.

    Example:
        >>> policy = PlannedPolicy(draft_length=4, max_pending=12)
        >>> few = PlanEntry(max_context=None, max_batch=4, policy=policy)
        >>> many = [PlanEntry(max_context=bound, policy=policy) for bound in (100, None)]
        >>> [(size, len(rows)) for size, rows in by_batch([few, *many])]
        [(4, 1), (None, 2)]
    """
    return [(size, [*rows]) for size, rows in groupby(plan, key=lambda row: row.max_batch)]


def _open_ended(bounds: Sequence[int | None]) -> bool:
    """Whether bounds rise and the last one alone is None."""
    known = [bound for bound in bounds if bound is not None]
    return [*bounds] == [*sorted(set(known)), None]


def plan_problems(plan: Sequence[PlanEntry], gates: Gates | None, decoding: Decoding | None) -> Iterator[str]:
    """What is wrong with a plan, in itself and beside the gates and settings of its spec, a line each.

    Args:
        gates: None where they are not known.
        decoding: the same.

    Example:
        >>> row = PlanEntry(max_context=None, policy=PlannedPolicy(draft_length=4, max_pending=12))
        >>> list(plan_problems([row, row], None, None))
        ['plan: max_context must rise from row to row, and be null in the last one alone']
    """
    batches = by_batch(plan)
    if not _open_ended([size for size, _ in batches]):
        yield "plan: max_batch must rise from rows to rows, and be null in the last ones alone"
    if not plan or not all(_open_ended([row.max_context for row in rows]) for _, rows in batches):
        of_each = " of one max_batch" if len(batches) > 1 else ""
        yield f"plan: max_context must rise from row to row{of_each}, and be null in the last one alone"
    policies = [row.policy for row in plan]
    if gates is not None:
        if gates.convention != "calibrated":
            yield f"plan: its bounds are of calibrated gates, and gates.convention is {gates.convention!r}"
        asked = [one.draft_stop_below > 0 or one.draft_accept_at <= 1 for one in policies if one.drafter is None]
        if gates.draft is None and any(asked):
            yield "plan: draft_stop_below and draft_accept_at need a draft gate"
    for one in policies:
        if one.drafter == "slim" and not one.slim_tier:
            yield "plan: drafter 'slim' needs a slim verifier that may decide; lower accept_at"
        if one.drafter == "none" and one.slim_tier:
            yield "plan: drafter 'none' needs a slim verifier that never decides; raise accept_at above 1"
    if decoding is not None:
        if decoding.audit != "strict":
            yield f"a plan is of exact decoding, and decoding.audit is {decoding.audit!r}; leave the plan out"
        for drafter in {one.drafter for one in policies} - {decoding.drafter, "slim", "none"}:
            yield (
                f"plan: drafter {drafter!r} is not that of decoding.drafter ({decoding.drafter!r}); a text is drafted "
                "by one drafter, or by none"
            )
