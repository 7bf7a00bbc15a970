"""Bridges in closed form: least squares on q's residual stream, no gradient step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from viasd_calib.replay.teacher import read_residuals
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.bridges import Bridge, new_bridges
from viasd_calib.slim.parts.skips import SkippedRun, skipped_runs
from viasd_calib.spec import Route
from viasd_calib.traces.data import TraceText
from viasd_calib.training.closed_form import LeastSquares

RIDGE = 1e-3
"""Weight of the penalty on the maps' size, relative to the inputs' mean square."""
KEPT_BRIDGES = 256
"""Fitted bridges that a search keeps for routes to come; one of SmolLM2-135M takes 1.3 MB."""


@torch.no_grad()
def fit_bridges(
    model: RoutedModel,
    routes: Sequence[Route],
    texts: Iterable[TraceText],
    rank: int | None = None,
    carry: bool = False,
) -> list[nn.ModuleDict]:
    """Fit the bridges of several routes in one reading of the texts.

    Each map predicts what its run of sublayers adds to the residual stream, from what enters the run in q, at the
    places where q wrote (ReplaceMe, arXiv 2505.02819, equation 4, with a ridge). A low rank keeps the directions in
    which the predictions vary most, which is least squares under that rank (Izenman 1975, reduced-rank regression).

    Args:
        rank: of the maps; None for full ones.
        carry: whether they read q's stream after the run at the place before, too.

    Returns:
        The bridges of each route, by name.
    """
    hidden = model.config.hidden_size
    runs = sorted({run for route in routes for run in skipped_runs(route)}, key=lambda run: (run.begin, run.end))
    numbers = sorted({number for run in runs for number in (run.begin, run.end)})
    problems = {run: LeastSquares((1 + carry) * hidden + 1, hidden) for run in runs}
    for text in texts if runs else ():
        stream = generated_residuals(model, text, numbers, lead=1)
        for run, problem in problems.items():
            before, after = stream[:, numbers.index(run.begin)], stream[:, numbers.index(run.end)]
            _add_examples(problem, before[1:], after[1:], after[:-1] if carry else None)
    return [_solve_all(route, problems, new_bridges(route, hidden, rank, carry), rank) for route in routes]


def generated_residuals(model: RoutedModel, text: TraceText, numbers: Sequence[int], lead: int = 0) -> Tensor:
    """q's residual stream at the n places of a text where q wrote: [lead + n, numbers, hidden], float32.

    Args:
        numbers: of the sublayers it enters, as :func:`~viasd_calib.replay.teacher.read_residuals` takes them.
        lead: places before those, to be given too; zeros before the text begins.
    """
    read = read_residuals(model, text.ids[None, :-1].to(model.device), numbers)  # [1, length, numbers, hidden]
    begin = text.prompt_length - 1 - lead
    kept = read[0, max(begin, 0) :].float()
    return torch.nn.functional.pad(kept, (0, 0, 0, 0, -begin, 0)) if begin < 0 else kept


def _add_examples(problem: LeastSquares, before: Tensor, after: Tensor, carried: Tensor | None = None) -> None:
    """What a run made of the residual stream ([n, hidden] each), as examples with a constant last input.

    Args:
        carried: the stream after the run, one place earlier; None for bridges without a carry.
    """
    inputs = [before, *([] if carried is None else [carried]), torch.ones_like(before[:, :1])]
    problem.add(torch.cat(inputs, 1), after - before)


class BridgeFitter:
    """Fits bridges for routes that are found one after another, as :func:`fit_bridges` does for routes known ahead.

    A run that several routes leave out is fitted once, and they share its bridge. Bridges have no carry: a search would
    have to keep q's stream after every run that it may come to try.

    Args:
        model: what the bridges are for.
        streams: q's residual stream before each sublayer and at the end, as :func:`all_streams` gives it.
        rank: of the maps; None for full ones.
    """

    def __init__(self, model: RoutedModel, streams: Sequence[Tensor], rank: int | None = None) -> None:
        self._model = model
        self._streams = streams
        self._rank = rank
        self._kept: dict[SkippedRun, Bridge] = {}

    def fit(self, route: Route) -> nn.ModuleDict:
        """The bridges of a route, by name, ready to run; they are shared, so no one trains them."""
        return nn.ModuleDict({run.name: self._bridge(run) for run in skipped_runs(route)})

    def _bridge(self, run: SkippedRun) -> Bridge:
        if run not in self._kept:
            if len(self._kept) == KEPT_BRIDGES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[run] = self._fit_run(run)
        return self._kept[run]

    def _fit_run(self, run: SkippedRun) -> Bridge:
        hidden = self._model.config.hidden_size
        problem = LeastSquares(hidden + 1, hidden)
        _add_examples(problem, self._streams[run.begin], self._streams[run.end])
        bridge = Bridge(hidden, self._rank)
        set_least_squares(bridge, problem, self._rank)
        return bridge.to(device=self._model.device, dtype=self._model.dtype).requires_grad_(False)


def all_streams(model: RoutedModel, texts: Iterable[TraceText]) -> list[Tensor]:
    """q's residual stream before each sublayer and at the end: [sublayers + 1] of [places, hidden], on the host.

    A place takes (sublayers + 1) x hidden x 4 bytes: 140 kB for SmolLM2-135M.
    """
    numbers = range(len(model.full_sublayers) + 1)
    read = torch.cat([generated_residuals(model, text, numbers).cpu() for text in texts])
    return [stream.contiguous() for stream in read.unbind(1)]


def _solve_all(
    route: Route, problems: dict[SkippedRun, LeastSquares], bridges: nn.ModuleDict, rank: int | None
) -> nn.ModuleDict:
    """Give each bridge of a route the map that solves its run's problem."""
    for run in skipped_runs(route):
        bridge = bridges[run.name]
        assert isinstance(bridge, Bridge)
        set_least_squares(bridge, problems[run], rank)
    return bridges


def set_least_squares(bridge: Bridge, problem: LeastSquares, rank: int | None) -> None:
    """Give a bridge the maps that solve a problem whose last input is the constant 1, its carry among them."""
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
