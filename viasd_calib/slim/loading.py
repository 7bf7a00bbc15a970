"""From a verifier and a spec's route to the two opened together, with the tensors that lie beside the spec."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from viasd_calib.choices import Backend
from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.slim.backends import choose_backend, open_model, prepare
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.offload.install import keep_resident, stream_layers
from viasd_calib.slim.offload.settings import Offload
from viasd_calib.slim.parts.base import Sizes, load_parts
from viasd_calib.spec import Route


def load_routed(model: PreTrainedModel, route: Route, folder: Path, backend: Backend = "eager") -> RoutedModel:
    """Open a verifier with the route of a spec that lies in ``folder``.

    Of one that was loaded without its layers, those come into memory that q' runs of q's own.

    Args:
        backend: what will run it.

    Raises:
        SpecError: the parts of the route do not fit the verifier.
        ModelError: the verifier is not of a supported kind.
    """
    keep_resident(model, route)
    return open_model(model, route, load_parts(route, folder, Sizes.of_config(model.config)), backend)


def load_ready(
    model: PreTrainedModel,
    route: Route,
    folder: Path,
    offload: Offload | None = None,
) -> RoutedModel:
    """The same on the backend that decodes by default, ready for it; that backend may change ``model`` in place.

    Args:
        offload: how layers are read of a verifier that was loaded without them.

    Raises:
        SpecError: the parts of the route do not fit the verifier.
        ModelError: the verifier is not of a supported kind.
    """
    backend = choose_backend(model)
    routed = load_routed(model, route, folder, backend)
    make_ready(routed, route, backend, offload)
    return routed


def make_ready(
    routed: RoutedModel,
    route: Route | None,
    backend: Backend,
    offload: Offload | None = None,
    networks: Iterable[nn.Module] = (),
) -> None:
    """Let q read its cold layers for each pass, prepare all that decodes for its backend, and give freed memory back.

    All in place: what a drafter takes of q's own modules, and taps, are settled before.

    Args:
        route: of q'; None where there is none, and all of q may be cold.
        backend: that ``routed`` was opened for.
        offload: how layers are read of a verifier that was loaded without them; None for one that has them.
        networks: what a drafter runs.

    Raises:
        ModelError: the backend does not run here, the memory is too little, or ``offload`` is given for a verifier that
            has its layers, or not for one without.
        StorageError: files cannot be written or read.
    """
    if offload is not None:
        stream_layers(routed, route, offload, backend)
    prepare((routed.model, *routed.slim_networks, *networks), backend, routed.device, routed.dtype)
    give_freed_memory_back()
