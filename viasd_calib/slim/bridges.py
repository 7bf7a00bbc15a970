"""Bridges: linear maps of the residual stream that stand in for runs of skipped sublayers.

The idea is ReplaceMe's (Shopkhoev et al. 2025, arXiv 2505.02819): what a run of layers adds to the residual stream is
nearly linear in what enters it. A bridge costs one small product in place of the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from viasd_calib.errors import SpecError
from viasd_calib.slim.tensors import read_tensors, write_bfloat16
from viasd_calib.spec import BridgesRef, Route, tensor_file


@dataclass(frozen=True)
class SkippedRun:
    """Sublayers in a row that a route leaves out; layer i's attention is number 2 i, its MLP number 2 i + 1.

    Attributes:
        begin: number of the first one.
        end: number behind the last one.
    """

    begin: int
    end: int

    @property
    def name(self) -> str:
        """Name of the bridge that stands in for it.

        Example:
            >>> SkippedRun(5, 9).name
            'mlp_2'
        """
        return f"{('attention', 'mlp')[self.begin % 2]}_{self.begin // 2}"


def skipped_numbers(route: Route) -> list[int]:
    """Numbers of the sublayers that a route leaves out, rising.

    Example:
        >>> skipped_numbers(Route(attention_skip=[1, 2, 5], mlp_skip=[1]))
        [2, 3, 4, 10]
    """
    return sorted([2 * layer for layer in route.attention_skip] + [2 * layer + 1 for layer in route.mlp_skip])


def skipped_runs(route: Route) -> list[SkippedRun]:
    """The longest runs that a route leaves out, in the order they would have run.

    Example:
        >>> skipped_runs(Route(attention_skip=[1, 2, 5], mlp_skip=[1]))
        [SkippedRun(begin=2, end=5), SkippedRun(begin=10, end=11)]
    """
    numbers = skipped_numbers(route)
    if not numbers:
        return []
    breaks = [place for place, (one, other) in enumerate(pairwise(numbers), start=1) if other != one + 1]
    edges = [0, *breaks, len(numbers)]
    return [SkippedRun(numbers[first], numbers[last - 1] + 1) for first, last in pairwise(edges)]


class Bridge(nn.Module):
    """x -> W x + b, what a run of sublayers would have added to the residual stream x.

    Args:
        hidden: width of the residual stream.
        rank: of W; None for a full one.

    Example:
        >>> bridge = Bridge(6, rank=2)
        >>> bridge(torch.randn(1, 3, 6)).abs().max().item()  # it begins as nothing
        0.0
    """

    def __init__(self, hidden: int, rank: int | None = None) -> None:
        super().__init__()
        self.down = nn.Identity() if rank is None else nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(hidden if rank is None else rank, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.up(self.down(hidden))  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_map(self, weight: Tensor, bias: Tensor, directions: Tensor | None = None) -> None:
        """Take a map that was fitted.

        Args:
            weight: [hidden, hidden], output by input.
            bias: [hidden].
            directions: of the outputs that a bridge of low rank keeps, orthonormal, [hidden, rank].
        """
        self.up.bias.copy_(bias)
        if isinstance(self.down, nn.Identity):
            self.up.weight.copy_(weight)
        else:
            assert directions is not None, "a low rank says which directions it keeps"
            self.down.weight.copy_(directions.T @ weight)
            self.up.weight.copy_(directions)
            self.up.bias.copy_(directions @ (directions.T @ bias))


def new_bridges(route: Route, hidden: int, rank: int | None = None) -> nn.ModuleDict:
    """A bridge for every run that a route leaves out, by name; they begin as nothing."""
    return nn.ModuleDict({run.name: Bridge(hidden, rank) for run in skipped_runs(route)})


def save_bridges(bridges: nn.ModuleDict, path: Path) -> None:
    """Write bridges in bfloat16, atomically."""
    write_bfloat16(bridges.state_dict(), path)


def bridges_ref(path: Path, folder: Path, rank: int | None) -> BridgesRef:
    """How a spec in ``folder`` names the bridges at ``path``."""
    return BridgesRef(rank=rank, tensors=tensor_file(path, folder))


def load_bridges(model: PreTrainedModel, route: Route, folder: Path) -> nn.ModuleDict | None:
    """The bridges of a route whose spec lies in ``folder``; None for a route without.

    Raises:
        SpecError: the tensors do not fit the verifier or the route.
    """
    if route.bridges is None:
        return None
    path = folder / route.bridges.tensors.path
    bridges = new_bridges(route, model.config.hidden_size, route.bridges.rank)
    tensors = read_tensors(path, "bridges")
    wrong = _first_misfit(bridges.state_dict(), tensors)
    if wrong is not None:
        raise SpecError(f"{path}: {wrong} does not fit the route; export the spec again")
    bridges.load_state_dict(tensors)
    return bridges.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)


def _first_misfit(own: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    shapes = {name: tensor.shape for name, tensor in own.items()}
    names: Sequence[str] = sorted(shapes.keys() | found.keys())
    return next((name for name in names if name not in found or shapes.get(name) != found[name].shape), None)
