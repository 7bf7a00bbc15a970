"""What ``viasd_calib`` exports: lazy, typed, and all there."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import viasd_calib

SOURCE = Path(viasd_calib.__file__)


def imported_for_types() -> dict[str, str]:
    """Names that type checkers see, and the module each comes from."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_type_checkers_see_what_is_loaded() -> None:
    typed = imported_for_types()
    assert sorted(viasd_calib.__all__) == sorted([*typed, "__version__"])
    for name, module in typed.items():
        assert getattr(viasd_calib, name) is getattr(import_module(module), name)
    assert set(viasd_calib.__all__) <= set(dir(viasd_calib))


def test_every_name_can_be_imported_at_once() -> None:
    names: dict[str, object] = {}
    exec("from viasd_calib import *", names)
    assert set(viasd_calib.__all__) <= set(names)
    assert callable(names["generate"])


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'viasd_calib' has no attribute 'degenerate'"):
        _ = viasd_calib.degenerate


@pytest.mark.slow
def test_the_package_is_light_until_a_name_is_asked_for() -> None:
    program = (
        "import sys, viasd_calib; dir(viasd_calib); print('torch' in sys.modules, 'pydantic' in sys.modules); "
        "viasd_calib.ViasdError; print('torch' in sys.modules); viasd_calib.generate; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False", "True"]
