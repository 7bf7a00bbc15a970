"""A linear layer with a low-rank adapter as it is run, without what training one takes."""

from __future__ import annotations

from torch import Tensor, nn


class LoRALinear(nn.Module):
    """W x + B A x (Hu et al. 2021, arXiv 2106.09685, equation 3), the adapter's scale being in B.

    Args:
        base: [..., in] -> [..., out]; its parameters may be another module's.
        down: A, [..., in] -> [..., rank].
        up: B, [..., rank] -> [..., out].
    """

    def __init__(self, base: nn.Module, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = down
        self.up = up

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.base(inputs) + self.up(self.down(inputs))  # type: ignore[no-any-return]
