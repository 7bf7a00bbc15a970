"""Hard-concrete gates: near-binary random variables with a differentiable chance of being zero.

Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization",
arXiv 1712.01312, section 2.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

STRETCH = (-0.1, 1.1)
"""The interval a concrete variable is stretched to before it is cut to [0, 1]: gamma and zeta of the paper."""


class HardConcrete(nn.Module):
    """A vector of hard-concrete gates.

    Args:
        size: number of gates.
        temperature: beta of the paper; lower is closer to binary.
        open_at_start: the chance that a gate is not zero to begin with.

    Example:
        >>> gates = HardConcrete(3, open_at_start=0.9)
        >>> [round(p, 2) for p in gates.chance_open().tolist()]
        [0.9, 0.9, 0.9]
    """

    def __init__(self, size: int, temperature: float = 2 / 3, open_at_start: float = 0.9) -> None:
        super().__init__()
        self.temperature = temperature
        begin = math.log(open_at_start / (1 - open_at_start)) + self._shift()
        self.log_alpha = nn.Parameter(torch.full((size,), begin, dtype=torch.float32))

    def _shift(self) -> float:
        """beta log(-gamma / zeta) of the paper's equation 12."""
        low, high = STRETCH
        return self.temperature * math.log(-low / high)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw every gate (equations 10 and 11): [size], in [0, 1], with exact zeros and ones."""
        low, high = STRETCH
        noise = torch.rand(self.log_alpha.shape, device=self.log_alpha.device, generator=generator)
        noise = noise.clamp(1e-6, 1 - 1e-6)
        stretched = torch.sigmoid((noise.logit() + self.log_alpha) / self.temperature) * (high - low) + low
        return stretched.clamp(0, 1)

    def chance_open(self) -> Tensor:
        """Chance that each gate is not zero (equation 12): [size]."""
        return torch.sigmoid(self.log_alpha - self._shift())
