"""What a command can check in milliseconds: whether its files are there, and whether its result can be written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from viasd_calib.decoding.sampling import Sampling
from viasd_calib.draft.places import LOOKUP, named_model, prefix_and_model, relocated
from viasd_calib.errors import (
    BenchError,
    CalibrationError,
    MethodError,
    SamplingError,
    SpecError,
    StorageError,
    TraceError,
    ViasdError,
)
from viasd_calib.evaluation.provenance import Provenance, read_document
from viasd_calib.file_names import CALIBRATE_FILE, FIT_FILE, FRONTIER_FILE, MANIFEST
from viasd_calib.model_names import beside, model_path
from viasd_calib.pipeline.lists import dashed
from viasd_calib.shipped import shipped
from viasd_calib.spec import Audit, RoutingSpec, load_spec


def check_out_file(option: str, path: str) -> None:
    """Refuse a file that could not be written when all is done.

    Raises:
        StorageError: no path, a folder, or a place that cannot be written.
    """
    if not path.strip():
        raise StorageError(f"{option} is empty; give the path of the file to write")
    target = Path(path)
    if target.is_dir():
        raise StorageError(f"cannot write {path}: it is a folder; give {option} the path of a file")
    _check_place(target, target.parent)


def check_out_folder(option: str, path: str) -> None:
    """Refuse a folder into which nothing could be written when all is done.

    Raises:
        StorageError: no path, a file, or a place that cannot be written.
    """
    if not path.strip():
        raise StorageError(f"{option} is empty; give the path of a folder")
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise StorageError(f"cannot write {path}: it is a file; give {option} the path of a folder")
    _check_place(target, target)


def _check_place(target: Path, folder: Path) -> None:
    """Whether ``folder`` is one that can be written, or can be made."""
    there = folder
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}; choose another path") from error
    if not there.is_dir():
        raise StorageError(f"cannot write {target}: {there} is not a folder; choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {target}: no permission in {there}; choose a folder that can be written")


def check_spec(path: str, verifier: str | None, draft_model: str | None = None) -> tuple[str, RoutingSpec]:
    """A routing spec that can be loaded, with the models it is to run on, and its path; a shipped one's is looked up.

    Args:
        verifier: in place of the spec's own.
        draft_model: the same.

    Raises:
        SpecError: it is missing or damaged.
        ModelError: a model is a path at which there is none, or the embedded default, and that is not installed; or
            there is a draft model for a spec that names none.
    """
    if not path.strip():
        raise SpecError("--spec is empty; give the path of a routing spec")
    found = shipped(path)
    spec, folder = load_spec(found), Path(found).parent
    check_model(beside(spec.verifier.name_or_path, folder) if verifier is None else verifier)
    if draft_model is not None:
        relocated(spec.draft, draft_model)  # refuses it where the spec names none
        check_model(draft_model)
    elif (drafting := named_model(spec.draft)) is not None:
        check_model(beside(drafting.name_or_path, folder))
    return found, spec


def check_audit(audit: Audit | None, methods: Sequence[str]) -> None:
    """Refuse a lossy audit for methods that have none, whose texts would be taken for those of that audit.

    Raises:
        MethodError: naming them.
    """
    if audit not in (None, "strict") and "three_tier" not in methods:
        raise MethodError(
            f"--audit is {audit}, which three_tier alone takes, and not {', '.join(methods)}; leave it out, or "
            "add that method"
        )


def check_model(name: str | None) -> None:
    """Refuse the name of a model, if one is given, that is a path at which there is none.

    Raises:
        ModelError: naming it.
    """
    if name is not None:
        model_path(name)


def check_draft(name: str) -> None:
    """Refuse a drafter's name that is a path at which there is nothing.

    Raises:
        StorageError: it is of the package's, and did not come with it.
        ModelError: naming it.
    """
    model = shipped(prefix_and_model(name)[1])
    if model not in ("", "none", LOOKUP):
        model_path(model)


def read_sampling_options(**settings: Any) -> Sampling:
    """Sampling settings that were given as options of the same names.

    Raises:
        SamplingError: naming the option that is out of its range.
    """
    try:
        return Sampling(**settings)
    except SamplingError as error:
        name, said = str(error).split(" ", 1)
        raise SamplingError(f"{dashed(name)} {said}") from error


def check_fit_folder(option: str, folder: str, *, of_frontier: bool = False) -> None:
    """Refuse a folder that ``viasd fit``, or ``viasd frontier``, did not finish.

    Raises:
        CalibrationError: naming the file that is missing or damaged.
    """
    name, command = (FRONTIER_FILE, "viasd frontier") if of_frontier else (FIT_FILE, "viasd fit")
    _check_json(option, Path(folder) / name, folder, command, CalibrationError)


def check_calibrate_folder(option: str, folder: str) -> None:
    """Refuse a folder that ``viasd calibrate`` did not finish.

    Raises:
        CalibrationError: naming the file that is missing or damaged.
    """
    _check_json(option, Path(folder) / CALIBRATE_FILE, folder, "viasd calibrate", CalibrationError)


def check_bench(option: str, path: str) -> Provenance | None:
    """Refuse a file that is not of ``viasd bench``, and say what it measured; None where it does not say.

    Raises:
        BenchError: it is missing, damaged or something else.
    """
    _check_json(option, Path(path), path, "viasd bench", BenchError)
    return read_document(path)[1]


def check_traces(option: str, folders: Sequence[str]) -> None:
    """Refuse folders that are not of ``viasd capture``.

    Raises:
        TraceError: there are none, or naming the first that is missing or damaged.
    """
    if not folders:
        raise TraceError(f"{option} is empty; give the folder that viasd capture wrote")
    for folder in folders:
        _check_json(option, Path(folder) / MANIFEST, folder, "viasd capture", TraceError)


def _check_json(option: str, path: Path, given: str, command: str, error: type[ViasdError]) -> None:
    if not given.strip():
        raise error(f"{option} is empty; give what {command} wrote")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}; run {command} first, or mend {option}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is damaged ({problem}); run {command} again") from problem
