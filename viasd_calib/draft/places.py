"""Names of drafters in files that may be moved: a folder is named as it lies from the file that names it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"((?:prompt_lookup\+)?(?:int[48]:)?)(.*)", re.DOTALL)
"""What stands before the draft model's own name, and that (:func:`~viasd_calib.draft.build.name_draft`)."""


def draft_from(name: str, folder: Path) -> str:
    """A drafter's name as a file in ``folder`` writes it: a relative path, if it is one, leads there from ``folder``.

    Example:
        >>> draft_from("prompt_lookup", Path("runs")), draft_from("prompt_lookup+int8:viasd_calib", Path("runs/traces"))
        ('prompt_lookup', 'prompt_lookup+int8:../../viasd_calib')
    """
    prefix, model = _parts(name)
    path = Path(model)
    if not model or path.is_absolute() or not path.exists():
        return name
    return prefix + Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def draft_at(name: str, folder: Path) -> str:
    """A drafter's name as it is read from a file in ``folder``.

    Earlier releases wrote paths relative to the folder that a command was run in: they are taken as they are where
    nothing lies there from ``folder``.
    """
    prefix, model = _parts(name)
    if not model or Path(model).is_absolute() or not (folder / model).exists():
        return name
    return f"{prefix}{folder / model}"


def same_draft(one: str, other: str, folder: Path) -> bool:
    """Whether two names in a file in ``folder`` are of one drafter."""
    return one == other or _resolved(one, folder) == _resolved(other, folder)


def _resolved(name: str, folder: Path) -> tuple[str, str | Path]:
    prefix, model = _parts(draft_at(name, folder))
    return prefix, Path(model).resolve() if model and Path(model).exists() else model


def _parts(name: str) -> tuple[str, str]:
    found = _NAME.fullmatch(name)
    assert found is not None, "it matches everything"
    return found[1], found[2]
