"""From a verifier and a spec's route to the two opened together, with the tensors that lie beside the spec."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from viasd_calib.choices import Backend
from viasd_calib.slim.backends import choose_backend, open_model, prepare
from viasd_calib.slim.forward import RoutedModel, SlimParts
from viasd_calib.slim.parts.adapter import load_slim_layers
from viasd_calib.slim.parts.bridges import load_bridges
from viasd_calib.slim.parts.head_vocab import load_head_ids
from viasd_calib.spec import Route


def load_routed(model: PreTrainedModel, route: Route, folder: Path, backend: Backend = "eager") -> RoutedModel:
    """Open a verifier with the route of a spec that lies in ``folder``: sublayers, bridges, adapter and output head.

    Args:
        backend: what will run it.

    Raises:
        SpecError: bridges, adapter or head vocabulary do not fit the verifier.
        ModelError: the verifier is not of a supported kind.
    """
    parts = SlimParts(
        layers=load_slim_layers(model, route, folder),
        bridges=load_bridges(model, route, folder) or nn.ModuleDict(),
        head_ids=load_head_ids(route, folder, model.config.vocab_size),
    )
    return open_model(model, route, parts, backend)


def load_ready(model: PreTrainedModel, route: Route, folder: Path) -> RoutedModel:
    """The same on the backend that decodes by default, ready for it; that backend may change ``model`` in place.

    Raises:
        SpecError: bridges, adapter or head vocabulary do not fit the verifier.
        ModelError: the verifier is not of a supported kind.
    """
    backend = choose_backend(model.device, model.dtype)
    routed = load_routed(model, route, folder, backend)
    prepare((model, *routed.slim_networks), backend, routed.device, routed.dtype)
    return routed
