"""No file of the package is long: a module has one reason to change."""

from __future__ import annotations

from pathlib import Path

import pytest

import viasd_calib

PACKAGE = Path(viasd_calib.__file__).parent
WRITTEN = {".py", ".cpp", ".h", ".j2"}
"""Endings of what people write; data and generated schemas have their own lengths."""

LIMIT = 450
FILES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in WRITTEN)


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_reaches_the_limit() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): lines_of(path) for path in FILES}
    long = {name: lines for name, lines in lengths.items() if lines >= LIMIT}
    assert not long, f"split these by reason to change: {long}"


@pytest.mark.parametrize("module", ["spec.py", "pipeline/options.py", "slim/parts/base.py"])
def test_files_are_found_and_counted(module: str) -> None:
    """The rule above looks at something."""
    assert PACKAGE / module in FILES
    assert 100 < lines_of(PACKAGE / module) < LIMIT
