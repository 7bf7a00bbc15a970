"""Least squares with a ridge, over examples that come in pieces: no gradient step."""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """Ridge regression whose examples come in pieces; the inputs' Gram matrix alone is kept.

    Example:
        >>> problem = LeastSquares(1, 1)
        >>> problem.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]]))
        >>> bool((problem.solve([0], 0.0) - 3).abs() < 1e-6)
        True
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.count = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take examples: inputs [n, inputs], outputs [n, outputs]."""
        self.gram += (inputs.T @ inputs).double().cpu()
        self.cross += (inputs.T @ outputs).double().cpu()
        self.count += inputs.shape[0]

    def solve(self, columns: list[int] | slice, ridge: float, known: Tensor | None = None) -> Tensor:
        """The map from some of the inputs: [columns, outputs].

        Args:
            columns: the inputs to use.
            ridge: penalty, as a share of the examples' number.
            known: a map [inputs, outputs] that explains a part already; the rest alone is fitted.
        """
        wanted = self.cross if known is None else self.cross - self.gram @ known
        gram = self.gram[columns][:, columns]
        penalty = ridge * self.count * torch.eye(gram.shape[0], dtype=gram.dtype)
        solution: Tensor = torch.linalg.solve(gram + penalty, wanted[columns])
        return solution
