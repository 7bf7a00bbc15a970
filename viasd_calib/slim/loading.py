"""From a verifier and a spec's route to the two opened together, with the tensors that lie beside the spec."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from viasd_calib.slim.adapter import load_slim_layers
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.head import load_head_ids
from viasd_calib.spec import Route


def load_routed(model: PreTrainedModel, route: Route, folder: Path) -> RoutedModel:
    """Open a verifier with the route of a spec that lies in ``folder``: its sublayers, adapter and output head.

    Raises:
        SpecError: the adapter or the head vocabulary does not fit the verifier.
        ModelError: the verifier is not of a supported kind.
    """
    head_ids = load_head_ids(route, folder, model.config.vocab_size)
    return RoutedModel(model, route, load_slim_layers(model, route, folder), head_ids)
