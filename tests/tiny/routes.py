"""Costs and bridges of routes through a tiny model."""

from __future__ import annotations

import torch
from torch import nn

from viasd_calib.slim.cost import SublayerCosts
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.bridges import new_bridges
from viasd_calib.spec import Route


def even_costs(model: RoutedModel) -> SublayerCosts:
    """Every sublayer costs the same, on any machine."""
    count = len(model.full_sublayers)
    return SublayerCosts(torch.full((count,), 1 / (count + 1)), 1 / (count + 1))


def random_bridges(route: Route, rank: int | None = None, carry: bool = False) -> nn.ModuleDict:
    """Bridges for a tiny model, exact in bfloat16."""
    bridges = new_bridges(route, 16, rank, carry)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in bridges.state_dict().values():
            tensor.copy_((0.1 * torch.randn(tensor.shape, generator=generator)).to(torch.bfloat16))
    return bridges.eval().requires_grad_(False)
