"""Whether the tensors beside a spec fit its route, as far as it shows without the verifier."""

from __future__ import annotations

from pathlib import Path

from viasd_calib.slim.parts.base import Sizes, part_named
from viasd_calib.spec import RoutingSpec


def tensor_misfits(spec: RoutingSpec, folder: Path) -> list[str]:
    """What does not fit, a line for each file; the files are there (:func:`~viasd_calib.spec.spec_problems`).

    A sublayer that was skipped after the bridges were fitted, for one, has none.

    Args:
        folder: of the spec.
    """
    route, sizes = spec.route, Sizes.of_ref(spec.verifier)
    return [problem for name in route.entries() for problem in part_named(name).misfits(route, folder, sizes)]
