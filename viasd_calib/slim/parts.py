"""What a spec adds to q to make q', loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from viasd_calib.slim.adapter import load_slim_layers
from viasd_calib.slim.bridges import load_bridges
from viasd_calib.slim.forward import SlimParts
from viasd_calib.spec import Route


def load_slim_parts(model: PreTrainedModel, route: Route, folder: Path) -> SlimParts:
    """What q' runs beside q's own modules, under a route whose spec lies in ``folder``.

    Raises:
        SpecError: tensors do not fit the verifier or the route.
    """
    bridges = load_bridges(model, route, folder)
    return SlimParts(load_slim_layers(model, route, folder), nn.ModuleDict() if bridges is None else bridges)
