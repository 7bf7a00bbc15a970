"""q over whole texts: the hidden states, keys and values that students read."""

from __future__ import annotations

import torch
from torch import Tensor

from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.forward import RoutedModel


@torch.no_grad()
def read_text(verifier: RoutedModel, ids: Tensor) -> tuple[Tensor, SharedCache]:
    """q over ``ids`` ([batch, length]): last hidden states [batch, length, hidden], and the filled cache."""
    batch, length = ids.shape
    cache = verifier.new_cache(length, batch=batch)
    return verifier.full(ids, CacheWindow(cache, 0, length, length)), cache


class HiddenStates:
    """q's last hidden states of every text, computed once and kept in bfloat16 on the host."""

    def __init__(self, verifier: RoutedModel) -> None:
        self._verifier = verifier
        self._kept: dict[int, Tensor] = {}

    def of(self, indices: list[int], ids: Tensor) -> Tensor:
        """States of a batch: [batch, length, hidden]; rows are as long as ``ids``."""
        if any(index not in self._kept for index in indices):
            hidden, _ = read_text(self._verifier, ids)
            for index, row in zip(indices, hidden, strict=True):
                self._kept[index] = row.to(torch.bfloat16).cpu()
        rows = [self._kept[index] for index in indices]
        return torch.stack([_fit(row, ids.shape[1]) for row in rows]).to(self._verifier.dtype).to(ids.device)


def _fit(row: Tensor, length: int) -> Tensor:
    """Cut or pad a row of states ([any, hidden]) to ``length``; what is padded is never read."""
    return torch.nn.functional.pad(row, (0, 0, 0, max(length - row.shape[0], 0)))[:length]
