"""Bridges: linear maps of the residual stream that replace runs of skipped sublayers.

The idea is ReplaceMe's (Shopkhoev et al. 2025, arXiv 2505.02819): what a run of layers adds to the residual stream is
nearly linear in what enters it. A bridge costs one small product in place of the whole run, two with a token shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from viasd_calib.errors import SpecError
from viasd_calib.slim.least_squares import LeastSquares
from viasd_calib.slim.parts.base import (
    FitInputs,
    Mark,
    PartOptions,
    Replay,
    RoutePart,
    Sizes,
    WrittenText,
    generated_residuals,
    register,
)
from viasd_calib.slim.parts.skips import skipped_runs
from viasd_calib.slim.plan import SlimPlan, StandIn
from viasd_calib.slim.tensors import read_tensors, write_bfloat16
from viasd_calib.spec import BridgesRef, Route, tensor_file

if TYPE_CHECKING:
    from viasd_calib.slim.forward import RoutedModel


RIDGE = 1e-3
"""Weight of the penalty on the maps' size, relative to the inputs' mean square."""


class Bridge(StandIn):
    """x -> W x + b, what a run of sublayers would have added to the residual stream x.

    With a token shift (``carry``), C y is added to that, where y is the stream after the run at the place before
    (:mod:`viasd_calib.slim.token_shift`).

    Args:
        hidden: width of the residual stream.
        rank: of W and C; None for full ones.
        carry: whether there is C.

    Example:
        >>> bridge = Bridge(6, rank=2)
        >>> bridge(torch.randn(1, 3, 6)).abs().max().item()  # it begins as nothing
        0.0
    """

    def __init__(self, hidden: int, rank: int | None = None, carry: bool = False) -> None:
        super().__init__()
        self.down = _down(hidden, rank)
        self.up = nn.Linear(hidden if rank is None else rank, hidden)
        self.carry_down = _down(hidden, rank) if carry else None
        self.carry_up = nn.Linear(self.up.in_features, hidden, bias=False) if carry else None
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if self.carry_up is not None:
            nn.init.zeros_(self.carry_up.weight)

    @property
    def has_shift(self) -> bool:
        """Whether it reads the place before."""
        return self.carry_up is not None

    def forward(self, hidden: Tensor) -> Tensor:
        """W x + b: [..., hidden] -> [..., hidden]."""
        return self.up(self.down(hidden))  # type: ignore[no-any-return]

    def token_shift(self, stream: Tensor) -> Tensor:
        """C y, what the next place takes from the stream after the run: [..., hidden] -> [..., hidden]."""
        assert self.carry_down is not None, "asked of a bridge with a token shift"
        assert self.carry_up is not None, "asked of a bridge with a token shift"
        return self.carry_up(self.carry_down(stream))  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_map(
        self, weight: Tensor, bias: Tensor, carry: Tensor | None = None, directions: Tensor | None = None
    ) -> None:
        """Take maps that were fitted.

        Args:
            weight: W, [hidden, hidden], output by input.
            bias: [hidden].
            carry: C, [hidden, hidden]; None for a bridge without.
            directions: of the outputs that a bridge of low rank keeps, orthonormal, [hidden, rank].
        """
        _set_product(self.down, self.up, weight, directions)
        self.up.bias.copy_(bias if directions is None else directions @ (directions.T @ bias))
        if self.carry_down is not None:
            assert self.carry_up is not None, "made together"
            assert carry is not None, "a bridge with a token shift is fitted with one"
            _set_product(self.carry_down, self.carry_up, carry, directions)


def _down(hidden: int, rank: int | None) -> nn.Module:
    return nn.Identity() if rank is None else nn.Linear(hidden, rank, bias=False)


def _set_product(down: nn.Module, up: nn.Linear, weight: Tensor, directions: Tensor | None) -> None:
    """Make ``up`` of ``down`` the map ``weight``, or its part in some directions."""
    if isinstance(down, nn.Linear):
        assert directions is not None, "a low rank says which directions it keeps"
        down.weight.copy_(directions.T @ weight)
        up.weight.copy_(directions)
    else:
        up.weight.copy_(weight)


def new_bridges(route: Route, hidden: int, rank: int | None = None, carry: bool = False) -> nn.ModuleDict:
    """A bridge for every run that a route leaves out, by name; they begin as nothing."""
    return nn.ModuleDict({run.name: Bridge(hidden, rank, carry) for run in skipped_runs(route)})


def token_shift_ends(route: Route, bridges: nn.ModuleDict) -> list[int]:
    """Numbers of the sublayers before which the residual stream is kept for a bridge's token shift, rising.

    Example:
        >>> route = Route(attention_skip=[1, 2], mlp_skip=[1])
        >>> (
        ...     token_shift_ends(route, new_bridges(route, hidden=4, carry=True)),
        ...     token_shift_ends(route, new_bridges(route, 4)),
        ... )
        ([5], [])
    """
    held = {run.end: bridges[run.name] for run in skipped_runs(route) if run.name in bridges}
    return [end for end, bridge in held.items() if isinstance(bridge, Bridge) and bridge.has_shift]


def save_bridges(bridges: nn.ModuleDict, path: Path) -> None:
    """Write bridges in bfloat16, atomically."""
    write_bfloat16(bridges.state_dict(), path)


def bridges_ref(path: Path, folder: Path, rank: int | None, carry: bool = False) -> BridgesRef:
    """How a spec in ``folder`` names the bridges at ``path``."""
    return BridgesRef(rank=rank, carry=carry, tensors=tensor_file(path, folder))


def _first_misfit(own: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    shapes = {name: tensor.shape for name, tensor in own.items()}
    names: Sequence[str] = sorted(shapes.keys() | found.keys())
    return next((name for name in names if name not in found or shapes.get(name) != found[name].shape), None)


class BridgeOptions(PartOptions):
    """Shape of the maps: their rank, None for full ones, and whether each has a second map, of the previous token."""

    rank: int | None = Field(None, ge=1)
    carry: bool = False


DEFAULT_OPTIONS = BridgeOptions()


@torch.no_grad()
def fit_bridges(
    model: RoutedModel,
    routes: Sequence[Route],
    texts: Iterable[WrittenText],
    replay: Replay,
    options: BridgeOptions = DEFAULT_OPTIONS,
) -> list[nn.ModuleDict]:
    """Fit the bridges of several routes in closed form, in one reading of the texts.

    Each map predicts what its run of sublayers adds to the residual stream, from what enters the run in q, at the
    places where q wrote (ReplaceMe, arXiv 2505.02819, equation 4, with a ridge). A low rank keeps the directions in
    which the predictions vary most, which is least squares under that rank (Izenman 1975, reduced-rank regression).
    Maps with a token shift read q's stream after the run at the place before, too.

    Args:
        replay: runs q over the texts.
        options: shape of the maps.

    Returns:
        The bridges of each route, by name.
    """
    hidden, carry = model.config.hidden_size, options.carry
    runs = sorted({run for route in routes for run in skipped_runs(route)}, key=lambda run: (run.begin, run.end))
    numbers = sorted({number for run in runs for number in (run.begin, run.end)})
    problems = {run: LeastSquares((1 + carry) * hidden + 1, hidden) for run in runs}
    for text in texts if runs else ():
        stream = generated_residuals(model, text, numbers, replay, lead=1)
        for run, problem in problems.items():
            before, after = stream[:, numbers.index(run.begin)], stream[:, numbers.index(run.end)]
            add_examples(problem, before[1:], after[1:], after[:-1] if carry else None)
    fitted = [new_bridges(route, hidden, options.rank, carry) for route in routes]
    for route, bridges in zip(routes, fitted, strict=True):
        for run in skipped_runs(route):
            bridge = bridges[run.name]
            assert isinstance(bridge, Bridge)
            set_least_squares(bridge, problems[run], options.rank)
    return fitted


def add_examples(problem: LeastSquares, before: Tensor, after: Tensor, shift_states: Tensor | None = None) -> None:
    """What a run made of the residual stream ([n, hidden] each), as examples with a constant last input.

    Args:
        shift_states: the stream after the run, one place earlier; None for bridges without a token shift.
    """
    inputs = [before, *([] if shift_states is None else [shift_states]), torch.ones_like(before[:, :1])]
    problem.add(torch.cat(inputs, 1), after - before)


def set_least_squares(bridge: Bridge, problem: LeastSquares, rank: int | None) -> None:
    """Give a bridge the maps that solve a problem whose last input is the constant 1, its token shift among them."""
    mean_square = float(problem.gram.diagonal()[:-1].mean()) / max(problem.count, 1)
    solution = problem.solve(slice(None), RIDGE * mean_square)  # [hidden + 1, hidden], or [2 hidden + 1, hidden]
    directions = None if rank is None else _directions(problem.gram, solution, rank)
    weight, *carry = solution[:-1].float().split(solution.shape[1])
    bridge.set_map(weight.T, solution[-1].float(), carry[0].T if carry else None, directions)


def _directions(gram: Tensor, solution: Tensor, rank: int) -> Tensor:
    """The directions in which predictions vary most, orthonormal: [hidden, rank]."""
    _, vectors = torch.linalg.eigh(solution.T @ gram @ solution)  # rising
    directions: Tensor = vectors[:, -rank:].float()
    return directions


@register
class Bridges(RoutePart[nn.ModuleDict]):
    """Linear maps in place of skipped runs, by the names of the runs."""

    name = "bridges"
    title = "bridges"
    contents = "their maps"
    options = BridgeOptions
    replaces_runs = True
    fit_has_options = True

    def fit(self, inputs: FitInputs, options: PartOptions) -> nn.ModuleDict:
        """The bridges of the route in closed form (:func:`fit_bridges`)."""
        assert isinstance(options, BridgeOptions)
        (bridges,) = fit_bridges(inputs.full, [inputs.route], inputs.texts, inputs.replay, options)
        return bridges

    def parameters(self, held: nn.ModuleDict, route: Route) -> list[nn.Parameter]:
        return [*held.parameters()]

    def save(self, held: nn.ModuleDict, route: Route, folder: Path, options: PartOptions) -> BridgesRef:
        assert isinstance(options, BridgeOptions)
        path = self.tensors_path(folder)
        save_bridges(held, path)
        return bridges_ref(path, folder, options.rank, options.carry)

    def load(self, route: Route, folder: Path, sizes: Sizes) -> nn.ModuleDict:
        """The bridges, in float32 on the host."""
        entry = route.bridges
        assert entry is not None, "asked of a route with bridges"
        path = folder / entry.tensors.path
        bridges = new_bridges(route, sizes.hidden, entry.rank, entry.carry)
        tensors = read_tensors(path, "bridges")
        wrong = _first_misfit(bridges.state_dict(), tensors)
        if wrong is not None:
            raise SpecError(f"{path}: {wrong} does not fit the route; export the spec again")
        bridges.load_state_dict(tensors)
        return bridges.eval().requires_grad_(False)

    def install(self, plan: SlimPlan, held: nn.ModuleDict) -> None:
        """Let bridges run where the sublayers they replace would; skipped runs without one are left out."""
        plan.place(held)
        for run in skipped_runs(plan.route):
            if run.name in held:
                bridge = held[run.name]
                assert isinstance(bridge, Bridge)
                plan.replace(run.begin, run.end, bridge, self.name)
        plan.kept_streams += token_shift_ends(plan.route, held)
        plan.networks.append(held)

    def line(self, route: Route, layers: int) -> str:
        shift = " with token shift" if route.bridges is not None and route.bridges.carry else ""
        count = len(skipped_runs(route))
        return f"a bridge{shift} for the run skipped" if count == 1 else f"bridges{shift} for the {count} runs skipped"

    def drawing(self, route: Route, layers: int) -> list[Mark]:
        label = "bridge, for the run below it"
        return [Mark("above", run.begin // 2, (run.end - 1) // 2, label) for run in skipped_runs(route)]
