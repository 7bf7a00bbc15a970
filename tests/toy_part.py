"""A part of a route in one file: what a package beside this one adds, and all that it adds.

In place of each run of skipped sublayers it adds the mean of what the run adds in q: a bridge without a matrix.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from viasd_calib.errors import SpecError
from viasd_calib.files import write_bytes
from viasd_calib.slim.parts.base import FitInputs, Mark, PartOptions, RoutePart, Sizes, register
from viasd_calib.slim.parts.skips import skipped_runs
from viasd_calib.slim.plan import SlimPlan, StandIn
from viasd_calib.slim.tensors import read_tensors
from viasd_calib.spec import PartEntry, Route, TensorFile, tensor_file


class MeanUpdateOptions(PartOptions):
    """Options of the fit."""

    scale: float = Field(1.0, ge=0, le=1)


class MeanUpdateEntry(PartEntry):
    """The entry in a spec."""

    scale: float = Field(ge=0, le=1)
    tensors: TensorFile


class Constant(StandIn):
    """Adds the same to every place."""

    def __init__(self, update: Tensor) -> None:
        super().__init__()
        self.update = nn.Parameter(update.clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.update.expand_as(hidden)


@register
class MeanUpdate(RoutePart[nn.ModuleDict]):
    """Mean updates in place of skipped runs, by the runs' names; they are trained on."""

    name = "mean_update"
    title = "mean updates"
    contents = "their vectors"
    entry = MeanUpdateEntry
    options = MeanUpdateOptions
    replaces_runs = True

    def fit(self, inputs: FitInputs, options: PartOptions) -> nn.ModuleDict:
        assert isinstance(options, MeanUpdateOptions)
        runs = skipped_runs(inputs.route)
        numbers = sorted({number for run in runs for number in (run.begin, run.end)})
        streams = [
            inputs.replay(inputs.full, text.ids[None, :-1], numbers)[0, text.prompt_length - 1 :]
            for text in inputs.texts
        ]
        mean = torch.cat(streams).mean(0)  # [numbers, hidden]
        at = dict(zip(numbers, mean, strict=True))
        return nn.ModuleDict({run.name: Constant(options.scale * (at[run.end] - at[run.begin])) for run in runs})

    def parameters(self, held: nn.ModuleDict, route: Route) -> list[nn.Parameter]:
        return [*held.parameters()]

    def save(self, held: nn.ModuleDict, route: Route, folder: Path, options: PartOptions) -> MeanUpdateEntry:
        assert isinstance(options, MeanUpdateOptions)
        path = self.tensors_path(folder)
        write_bytes(path, save({name: module.update.detach() for name, module in held.items()}))
        return MeanUpdateEntry(scale=options.scale, tensors=tensor_file(path, folder))

    def load(self, route: Route, folder: Path, sizes: Sizes) -> nn.ModuleDict:
        entry = route.entries()[self.name]
        assert isinstance(entry, MeanUpdateEntry)
        path = folder / entry.tensors.path
        updates = read_tensors(path, self.title)
        if updates.keys() != {run.name for run in skipped_runs(route)}:
            raise SpecError(f"{path} is of other runs than the route skips; export the spec again")
        return nn.ModuleDict({name: Constant(update) for name, update in updates.items()})

    def install(self, plan: SlimPlan, held: nn.ModuleDict) -> None:
        plan.place(held)
        for run in skipped_runs(plan.route):
            module = held[run.name]
            assert isinstance(module, Constant)
            plan.replace(run.begin, run.end, module, self.name)
        plan.networks.append(held)

    def line(self, route: Route, layers: int) -> str:
        return f"{self.title} in place of {len(skipped_runs(route))} runs"

    def drawing(self, route: Route, layers: int) -> list[Mark]:
        runs = skipped_runs(route)
        return [Mark("above", run.begin // 2, (run.end - 1) // 2, "mean update of the run below it") for run in runs]
