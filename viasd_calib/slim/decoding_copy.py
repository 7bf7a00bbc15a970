"""A verifier as it will decode here: a copy in the fastest number format, ready for the backend that runs it.

A slim verifier is fitted in float32, in which low bits gain nothing; what its passes cost is measured on such a copy.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from viasd_calib.host_memory import give_freed_memory_back
from viasd_calib.models import DTYPE_NAMES
from viasd_calib.slim.backends import choose_backend, fastest_dtype, open_model, prepare
from viasd_calib.slim.cost import relative_cost
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import RelativeCost, Route


def decoding_copy(model: PreTrainedModel, route: Route, held: Mapping[str, object]) -> RoutedModel:
    """A copy of a verifier with a route, ready to decode; ``model`` stays as it is.

    It takes half of the memory of a model in float32 beside it, where it is in bfloat16.

    Args:
        model: with plain weights.
        route: of q'.
        held: what its parts hold, by name; modules among them are brought to the copy's number format in place.

    Raises:
        ModelError: the verifier is not of a supported kind.
    """
    give_freed_memory_back()  # of a fit in float32: what it no longer holds is as large as the copy
    copied = copied_in(model, getattr(torch, fastest_dtype(model.device)))
    backend = choose_backend(copied)
    routed = open_model(copied, route, held, backend)
    prepare((copied, *routed.slim_networks), backend, routed.device, routed.dtype)
    return routed


def copied_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy in another number format; buffers stay in theirs, as they do where a verifier is loaded."""
    weights = {id(one): nn.Parameter(one.detach().to(dtype), requires_grad=False) for one in model.parameters()}
    return copy.deepcopy(model, weights)  # the copy has these in their places


def decoding_cost(
    model: PreTrainedModel, route: Route, held: Mapping[str, object], widths: Sequence[int] = (1, 4, 8)
) -> RelativeCost:
    """Time of a slim pass over that of a full one, by width, as both will decode here; arguments as above.

    Warns where the route has low bits, and nothing has kernels for them.
    """
    found = cost_of(decoding_copy(model, route, held), widths)
    gc.collect()  # modules of the copy know one another, and would stay with its weights until Python looks for such
    give_freed_memory_back()
    return found


def cost_of(routed: RoutedModel, widths: Sequence[int] = (1, 4, 8)) -> RelativeCost:
    """The same of a verifier with a route that is ready to decode."""
    return RelativeCost(
        measured={width: round(share, 4) for width, share in relative_cost(routed, widths).items()},
        device=str(routed.device),
        dtype=DTYPE_NAMES[routed.dtype],
    )
