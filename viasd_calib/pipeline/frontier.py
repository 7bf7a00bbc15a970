"""Fits for several target costs, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viasd_calib.file_names import FIT_FILE, FRONTIER_FILE
from viasd_calib.files import read_json, write_json
from viasd_calib.pipeline import lazy_types
from viasd_calib.spec import DType

PICTURE = "frontier.png"


def member_folder(out: Path, cost: float) -> Path:
    """Where the fit of a target cost lies.

    Example:
        >>> member_folder(Path("runs"), 0.50).as_posix()
        'runs/cost-0.5'
    """
    return out / f"cost-{cost}"


def measure_frontier(
    out: Path, costs: Sequence[float], verifier: str | None, dtype: DType, device: str
) -> lazy_types.Frontier:
    """Measure the fits that lie in ``out``, and write their table and picture there.

    The verifier is loaded anew for each, as a backend may change it in place.

    Args:
        verifier: where to find it, in place of the name in the fits.

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

    folders = [member_folder(out, cost) for cost in costs]
    fits = [read_json(FitArtifact, folder / FIT_FILE, "viasd fit") for folder in folders]
    check_comparable(fits)
    members: list[FrontierMember] = []
    for cost, folder, fitted in zip(costs, folders, fits, strict=True):
        model = load_verifier(verifier or fitted.verifier.name_or_path, dtype=dtype, device=device).model
        members.append(measure_member(folder, cost, load_ready(model, fitted.route, folder)))
    found = Frontier(dtype=dtype, device=device, hardware=hardware(torch.device(device)), members=members)
    write_json(out / FRONTIER_FILE, found)
    write_figure(frontier_picture(found), out / PICTURE)
    return found
