"""Made-up texts for a replay, of p and q' that are right as often as is asked for."""

from __future__ import annotations

import torch

from viasd_calib.planning.traced import DraftedPlaces, ReplayTable, ReplayText, SlimPlaces


def made_up_table(
    draft_right: float, slim_right: float | None, *, texts: int = 20, length: int = 60, depths: int = 4, ages: int = 13
) -> ReplayTable:
    """Texts on which gates know roughly, and not always, where p and q' are right.

    Args:
        slim_right: None for texts without what q' says.
    """
    draw = torch.Generator().manual_seed(0)

    def scores(right: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(right.shape, generator=draw)
        return torch.where(right, 0.3 + 0.7 * noise, 0.7 * noise)

    found = []
    for _ in range(texts):
        agrees = torch.rand(depths, length, generator=draw) < draft_right
        drafted = DraftedPlaces(torch.ones_like(agrees), agrees, scores(agrees), torch.zeros(length).bool())
        slim = None
        if slim_right is not None:
            right = torch.rand(length, generator=draw) < slim_right
            own = scores(right).expand(ages, depths + 1, -1)
            accept = torch.where(agrees, own[:, :depths], 0.1)
            slim = SlimPlaces(accept, own[:, :depths].clone(), own.clone(), right.expand(ages, -1).clone())
        found.append(ReplayText(length, drafted, slim))
    return ReplayTable.of(found)
