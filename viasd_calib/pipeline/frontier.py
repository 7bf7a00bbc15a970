"""Fits for several target costs, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from viasd_calib.file_names import FIT_FILE, FRONTIER_FILE
from viasd_calib.files import read_json, write_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.pipeline.low_bit_fits import LOW_BIT_FITS, OF_A_TARGET
from viasd_calib.pipeline.notices import notice
from viasd_calib.spec import DType, Route

PICTURE = "frontier.png"


def member_folder(out: Path, cost: float) -> Path:
    """Where the fit of a target cost lies.

    Example:
        >>> member_folder(Path("runs"), 0.50).as_posix()
        'runs/cost-0.5'
    """
    return out / f"cost-{cost}"


class PlannedMember(NamedTuple):
    """A fit of a frontier.

    Attributes:
        folder: of its results.
        target_cost: None for one that looks at none.
        words: its own options of ``viasd fit``.
    """

    folder: Path
    target_cost: float | None
    words: tuple[str, ...]


def planned_members(out: Path, costs: Sequence[float], low_bits: Sequence[str]) -> list[PlannedMember]:
    """A member for each target cost, and those in low bits: one each, or one for each target cost.

    Args:
        low_bits: names of :data:`~viasd_calib.pipeline.low_bit_fits.LOW_BIT_FITS`.

    Example:
        >>> planned = planned_members(Path("runs"), [0.5], ["8", "auto"])
        >>> [member.folder.name for member in planned]
        ['cost-0.5', 'low-bit-8', 'low-bit-auto-0.5']
    """
    planned = [PlannedMember(member_folder(out, cost), cost, ()) for cost in costs]
    for name in low_bits:
        folder = f"low-bit-{name.replace('_', '-')}"
        if name in OF_A_TARGET:
            planned += [PlannedMember(out / f"{folder}-{cost}", cost, LOW_BIT_FITS[name]) for cost in costs]
        else:
            planned.append(PlannedMember(out / folder, None, LOW_BIT_FITS[name]))
    return planned


def timing_dtype(routes: Sequence[Route], device: str) -> DType:
    """The number format to time passes in, where the user names none: float32, or where a route has low bits, and
    bfloat16 kernels for them here, bfloat16 for all, with a notice."""
    import torch

    from viasd_calib.slim.backends import low_bits_have_kernels

    low = any(route.low_bit is not None for route in routes)
    if not low or not low_bits_have_kernels(torch.device(device), torch.bfloat16):
        return "float32"
    notice("passes are timed in bfloat16, in which low bits have kernels here; --dtype float32 times them without")
    return "bfloat16"


def measure_frontier(
    out: Path, members: Sequence[PlannedMember], verifier: str | None, dtype: DType | None, device: str
) -> lazy_types.Frontier:
    """Measure the fits that lie in ``out``, and write their table and picture there.

    The verifier is loaded anew for each, as a backend may change it in place.

    Args:
        verifier: where to find it, in place of the name in the fits.
        dtype: None for :func:`timing_dtype`.

    Raises:
        CalibrationError: a fit is missing or damaged, or the fits cannot be compared.
    """
    import torch

    from viasd_calib.calibration.artifacts import FitArtifact
    from viasd_calib.evaluation.frontier import Frontier, FrontierMember, check_comparable, measure_member
    from viasd_calib.evaluation.plots import frontier_picture, write_figure
    from viasd_calib.hardware import hardware
    from viasd_calib.models import load_verifier
    from viasd_calib.slim.loading import load_ready

    fits = [read_json(FitArtifact, member.folder / FIT_FILE, "viasd fit") for member in members]
    check_comparable(fits)
    dtype = dtype or timing_dtype([fitted.route for fitted in fits], device)
    measured: list[FrontierMember] = []
    for member, fitted in zip(members, fits, strict=True):
        model = load_verifier(verifier or fitted.verifier.name_or_path, dtype=dtype, device=device).model
        routed = load_ready(model, fitted.route, member.folder)
        measured.append(measure_member(member.folder, member.target_cost, routed))
    found = Frontier(dtype=dtype, device=device, hardware=hardware(torch.device(device)), members=measured)
    write_json(out / FRONTIER_FILE, found)
    write_figure(frontier_picture(found), out / PICTURE)
    return found
