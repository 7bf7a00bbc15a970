"""Gates at run time: a logistic model over named, q-free features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from viasd_calib.spec import Gates, LogisticGate


class Gate:
    """P(q's choice = this token | features), for a batch of tokens.

    Args:
        spec: the fitted gate.
        device: where features will be.

    Example:
        >>> spec = LogisticGate(features=["draft_margin"], mean=[1.0], scale=[2.0], weight=[4.0], bias=0.0)
        >>> Gate(spec)({"draft_margin": torch.tensor([1.0, 2.0])}).tolist()
        [0.5, 0.8807970285415649]
    """

    def __init__(self, spec: LogisticGate, device: torch.device | str = "cpu") -> None:
        self.names = spec.features
        scale = torch.tensor(spec.scale, dtype=torch.float32)
        weight = torch.tensor(spec.weight, dtype=torch.float32) / scale
        self._weight = weight.to(device)  # [features]
        self._bias = (spec.bias - (weight * torch.tensor(spec.mean, dtype=torch.float32)).sum()).to(device)

    @property
    def device(self) -> torch.device:
        """Where its weights are, and where features must be."""
        return self._weight.device

    def __call__(self, features: Mapping[str, Tensor]) -> Tensor:
        """Scores in [0, 1] for features of shape [k] each: [k], float32."""
        return self.of_stacked(self.stack(features))

    def stack(self, features: Mapping[str, Tensor]) -> Tensor:
        """The features that the gate looks at ([k] each), in its order: [k, features]."""
        return torch.stack([features[name] for name in self.names], -1)

    def with_feature(self, stacked: Tensor, name: str, values: Tensor) -> Tensor:
        """Stacked features with other values ([k]) of one of them, where the gate looks at it: [k, features]."""
        if name not in self.names:
            return stacked
        changed = stacked.clone()
        changed[:, self.names.index(name)] = values
        return changed

    def of_stacked(self, stacked: Tensor) -> Tensor:
        """Scores in [0, 1] for features as :meth:`stack` gives them, [k, features]: [k], float32."""
        return torch.sigmoid(stacked @ self._weight + self._bias)


def draft_gate(gates: Gates, device: torch.device | str = "cpu") -> Gate | None:
    """The draft gate of a spec; None where it has none."""
    return None if gates.draft is None else Gate(gates.draft, device)
