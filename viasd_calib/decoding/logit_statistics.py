"""Statistics of draft logits, computed once a row while a block is drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from viasd_calib.decoding.kernels import LogitStatistics, logit_statistics
from viasd_calib.draft.base import Pick, to_verifier_ids


@dataclass(frozen=True)
class CachedStatistics:
    """Statistics of the logits at each place of a block, computed at the first call for it.

    Attributes:
        rows: of the places so far, one row each.

    Example:
        >>> import torch
        >>> statistics, logits = CachedStatistics(), torch.tensor([0.0, 2.0])
        >>> statistics.at(logits, 0) is statistics.at(logits, 0)
        True
    """

    rows: list[LogitStatistics] = field(default_factory=list)

    def at(self, logits: Tensor, place: int) -> LogitStatistics:
        """Those of the logits ([draft vocabulary]) at a place, one row; places come in their order."""
        if place == len(self.rows):
            self.rows.append(logit_statistics(logits[None]))
        return self.rows[place]


@dataclass(frozen=True)
class StatisticsPick(Pick):
    """Takes the most likely token from statistics that the draft gate uses too."""

    statistics: CachedStatistics

    def __call__(self, logits: Tensor, drafted: Sequence[Tensor], vocabulary: Tensor | None) -> Tensor:
        return to_verifier_ids(self.statistics.at(logits, len(drafted)).argmax, vocabulary)

    def proposal_probs(self, tokens: Tensor) -> None:
        return None
