"""The kinds of picture that can be written."""

from __future__ import annotations

from pathlib import Path

from viasd_calib.errors import StorageError

PICTURE_FORMATS = ("png", "svg", "pdf")


def picture_format(path: Path) -> str:
    """The format that a picture's ending names.

    Raises:
        StorageError: it names none that can be drawn.

    Example:
        >>> picture_format(Path("profile.png"))
        'png'
    """
    name = path.suffix.lower().removeprefix(".")
    if name not in PICTURE_FORMATS:
        known = ", ".join(f".{known}" for known in PICTURE_FORMATS)
        raise StorageError(f"cannot draw {path}: its ending names no kind of picture; choose one of {known}")
    return name
