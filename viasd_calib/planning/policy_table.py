"""Policies as a table of tensors, so that many are replayed at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from viasd_calib.decoding.policies import Policy


@dataclass(frozen=True)
class PolicyTable:
    """Policies, each tensor [policies]."""

    draft_length: Tensor
    stop_below: Tensor
    draft_accept_at: Tensor
    accept_at: Tensor
    max_pending: Tensor
    drafting_pays_at: Tensor

    @classmethod
    def of(cls, policies: Sequence[Policy]) -> PolicyTable:
        """A table of policies, one at least."""
        return cls(
            torch.tensor([one.draft_length for one in policies]),
            torch.tensor([one.stop_below for one in policies], dtype=torch.float32),
            torch.tensor([one.draft_accept_at for one in policies], dtype=torch.float32),
            torch.tensor([one.accept_at for one in policies], dtype=torch.float32),
            torch.tensor([one.max_pending for one in policies]),
            torch.tensor([one.drafting_pays_at for one in policies], dtype=torch.float64),
        )

    def at(self, rows: Tensor) -> PolicyTable:
        """Some of them, by their numbers."""
        return PolicyTable(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})
