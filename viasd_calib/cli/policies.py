"""Policies of exact decoding in a table's cell."""

from __future__ import annotations

from viasd_calib.pipeline import lazy_types


def bounds_of(policy: lazy_types.Policy) -> str:
    """What a policy is made of, in a few words."""
    parts = [f"draft {policy.draft_length}"] if policy.drafts else []
    parts += [f"stop {policy.stop_below:g}"] if policy.stop_below else []
    parts += [f"gate {policy.draft_accept_at:g}"] if policy.draft_accept_at <= 1 else []
    parts += [f"slim {policy.accept_at:g}, pending {policy.max_pending}"] if policy.slim_tier else []
    return ", ".join(parts) or "-"
