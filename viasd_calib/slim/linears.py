"""Where the linear layers of a model are, for those who put others in their place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class LinearPlace(NamedTuple):
    """A linear layer, and what holds it.

    Attributes:
        path: its name from the module that was looked through.
        holder: the module whose attribute ``name`` it is.
    """

    path: str
    holder: nn.Module
    name: str
    linear: nn.Linear

    def put(self, module: nn.Module) -> None:
        """Let ``module`` stand there from now on."""
        setattr(self.holder, self.name, module)


def plain_linears(modules: Iterable[nn.Module]) -> list[LinearPlace]:
    """Every place inside ``modules`` that holds a linear layer; what derives from one may compute something else.

    Example:
        >>> [place.path for place in plain_linears([nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))])]
        ['1.0']
    """
    return [
        LinearPlace(f"{path}.{name}".lstrip("."), holder, name, child)
        for module in modules
        for path, holder in module.named_modules()
        for name, child in holder.named_children()
        if type(child) is nn.Linear
    ]
