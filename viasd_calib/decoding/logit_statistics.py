"""Rows of draft logits, read once each while they are drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from viasd_calib.decoding.kernels import LogitStatistics, logit_statistics
from viasd_calib.draft.base import Pick, to_verifier_ids


@dataclass(frozen=True)
class CachedStatistics:
    """Reads the row of each place of a block when it is first asked for, and keeps what it says.

    Attributes:
        readings: of the places so far, one row each.

    Example:
        >>> import torch
        >>> reader, logits = CachedStatistics(), torch.tensor([0.0, 2.0])
        >>> reader.read(logits, 0) is reader.read(logits, 0)
        True
    """

    readings: list[LogitStatistics] = field(default_factory=list)

    def read(self, logits: Tensor, place: int) -> LogitStatistics:
        """What the logits ([draft vocabulary]) of a place say, one row; places come in their order."""
        if place == len(self.readings):
            self.readings.append(logit_statistics(logits[None]))
        return self.readings[place]


@dataclass(frozen=True)
class StatisticsPick(Pick):
    """Takes the likeliest token from a reading that others look at too."""

    reader: CachedStatistics

    def __call__(self, logits: Tensor, drafted: Sequence[Tensor], vocabulary: Tensor | None) -> Tensor:
        return to_verifier_ids(self.reader.read(logits, len(drafted)).argmax, vocabulary)

    def proposal_probs(self, tokens: Tensor) -> None:
        return None
