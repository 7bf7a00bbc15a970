"""The versions that a fresh clone gets, against the ranges of setup.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FILES = ("constraints.txt", "constraints-lowest.txt")
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[Requirement]:
    """All that setup.py asks for, the development tools included."""
    given: dict[str, Any] = {}
    stand_in = SimpleNamespace(setup=given.update, find_packages=lambda **_: [])
    monkeypatch.setitem(sys.modules, "setuptools", stand_in)  # type: ignore[arg-type]
    runpy.run_path(str(ROOT / "setup.py"))
    return [Requirement(line) for line in [*given["install_requires"], *given["extras_require"]["dev"]]]


def pins_of(name: str, python: str) -> dict[str, str]:
    """The versions that a file names for Linux on one Python, by package."""
    asked = [Requirement(line) for line in (ROOT / name).read_text().splitlines()]
    where = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux",
             "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
             "platform_python_implementation": "CPython"}  # fmt: skip
    pins: dict[str, str] = {}
    for one in asked:
        if one.marker is None or one.marker.evaluate(where):
            ((operator, version),) = ((part.operator, part.version) for part in one.specifier)
            assert operator == "=="
            package = canonicalize_name(one.name)
            assert package not in pins, f"{package} twice on Python {python}"
            pins[package] = version
    return pins


def test_every_range_has_two_ends(ranges: list[Requirement]) -> None:
    assert len(ranges) > 20
    for one in ranges:
        assert sorted(part.operator for part in one.specifier) == ["<", ">="], one


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", FILES)
def test_a_version_is_named_for_each_range_and_lies_in_it(name: str, python: str, ranges: list[Requirement]) -> None:
    pins = pins_of(name, python)
    for one in ranges:
        assert one.specifier.contains(pins[canonicalize_name(one.name)]), one
    assert len(pins) > 100, "what those need is named too"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lowest_versions_are_the_lower_ends(python: str, ranges: list[Requirement]) -> None:
    pins = pins_of("constraints-lowest.txt", python)
    for one in ranges:
        (lower,) = (part.version for part in one.specifier if part.operator == ">=")
        assert Version(pins[canonicalize_name(one.name)]) == Version(lower), one


@pytest.mark.parametrize("name", FILES)
def test_constraints_name_no_build_and_no_place(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "+" not in text
    assert "://" not in text
    assert "index-url" not in text
