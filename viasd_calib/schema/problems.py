"""What a validation found wrong, in words; and which versions of a file are read."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from viasd_calib.errors import ViasdError

WHOLE = "spec"
"""Names the place of a problem that is of no single entry."""


def problems_of(error: ValidationError, whole: str = WHOLE) -> list[str]:
    """Everything a validation found wrong, a line each: where, and what; ``whole`` names the place of what has none."""
    found: list[str] = []
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"]) or whole
        if one["type"] == "extra_forbidden":
            found.append(f"{where}: is no entry that this release knows; remove it")
            continue
        # A validator of ours has a line for each problem.
        found += [f"{where}: {line}" for line in one["msg"].removeprefix("Value error, ").split("\n")]
    return found


def first_problem(error: ValidationError, whole: str = WHOLE) -> str:
    """The first of :func:`problems_of`."""
    return problems_of(error, whole)[0]


def refuse_unknown_version(path: Path, version: object, known: str, again: str, error: type[ViasdError]) -> None:
    """Refuse a file of another major version than ``known``, or of a newer minor one.

    Within a major version a release reads what earlier ones wrote. What a later one added it cannot know.

    Args:
        known: the newest version that is read, as in "1.1".
        again: how the file is made anew.
        error: what is raised.

    Raises:
        ViasdError: of the type ``error``.
    """
    major, minor = (int(part) for part in known.split("."))
    found = re.fullmatch(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})", str(version), re.ASCII)
    if found is None or int(found[1]) < major:
        raise error(
            f"{path}: schema_version {version!r} is not one this release reads ({known}); "
            f"use the release that wrote it, or {again}"
        )
    if (int(found[1]), int(found[2])) > (major, minor):
        raise error(
            f"{path}: made by a newer version of viasd_calib (schema_version {version}, this release reads up to "
            f"{known}); update viasd_calib, or {again} with this release"
        )
