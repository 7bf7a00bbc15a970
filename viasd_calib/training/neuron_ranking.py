"""Which neurons of an MLP matter: how strongly q's own texts excite each, and how much it then adds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from viasd_calib.replay.teacher import read_text
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.parts.mlp_keep import neuron_order
from viasd_calib.traces.data import TraceText


class _Excitement:
    """Sums what enters an MLP's down projection at the places of texts, in one number for each neuron."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp
        self.sums = torch.zeros(mlp.down_proj.in_features, dtype=torch.float64)

    def add(self, begin: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take the places of one text from ``begin`` on, as a hook of the down projection."""
        self.sums += inputs[0][0, begin:].abs().double().sum(0).cpu()  # [intermediate]

    def ranked(self) -> Tensor:
        """The neurons, most important first, as the verifier's own file counts them: [intermediate], long."""
        reach = self.mlp.down_proj.weight.detach().double().norm(dim=0).cpu()  # [intermediate]
        order = (self.sums * reach).argsort(descending=True, stable=True)
        return neuron_order(self.mlp).cpu()[order]


@torch.no_grad()
def rank_neurons(model: RoutedModel, layers: Collection[int], texts: Iterable[TraceText]) -> dict[int, Tensor]:
    """Rank the neurons of some MLPs by mean |act(gate) * up| at the places where q wrote, times their column's norm.

    The score of Wanda (Sun et al. 2023, arXiv 2306.11695, equation 1), activation times weight, for a whole neuron in
    place of a single weight, and with the activations' mean size in place of their norm.

    Args:
        model: q.
        layers: whose MLPs are ranked.

    Returns:
        By layer, its neurons, most important first, as the verifier's own file counts them: [intermediate], long.
    """
    found = {layer: _Excitement(model.layers[layer].mlp) for layer in layers}
    for text in texts:
        with ExitStack() as hooks:
            for one in found.values():
                hook = partial(one.add, text.prompt_length - 1)
                hooks.callback(one.mlp.down_proj.register_forward_pre_hook(hook).remove)
            read_text(model, text.ids[None, :-1].to(model.device))
    return {layer: one.ranked() for layer, one in found.items()}
