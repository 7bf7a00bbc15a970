"""Whether the tensors beside a spec fit its route, as far as it shows without the verifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from viasd_calib.errors import SpecError
from viasd_calib.slim.parts.adapter import adapter_misfit
from viasd_calib.slim.parts.bridges import read_bridges
from viasd_calib.slim.parts.head_vocab import load_head_ids
from viasd_calib.slim.parts.mlp_keep import load_widths
from viasd_calib.spec import RoutingSpec


def tensor_misfits(spec: RoutingSpec, folder: Path) -> list[str]:
    """What does not fit, a line for each file; the files are there (:func:`~viasd_calib.spec.spec_problems`).

    A sublayer that was skipped after the bridges were fitted, for one, has none.

    Args:
        folder: of the spec.
    """
    route, verifier = spec.route, spec.verifier
    reads: list[Callable[[], object]] = [
        partial(read_bridges, route, folder, verifier.hidden_size),
        partial(load_head_ids, route, folder, verifier.vocab_size),
        partial(load_widths, route, folder, None),
    ]
    problems: list[str] = []
    for read in reads:
        try:
            read()
        except SpecError as error:
            problems.append(str(error))
    try:
        wrong = adapter_misfit(route, folder, verifier.num_layers)
        problems += [] if wrong is None else [f"{wrong}; export the spec again"]
    except SpecError as error:
        problems.append(str(error))
    return problems
