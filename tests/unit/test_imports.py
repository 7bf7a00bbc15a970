"""Imports go one way, so that the decoder can be deployed without the training half."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import viasd_calib

PACKAGE = Path(viasd_calib.__file__).parent
PACKAGES = [
    "errors",
    "option_types",
    "choices",
    "file_names",
    "shipped",
    "model_names",
    "token_ids",
    "files",
    "ledger",
    "hardware",
    "host_memory",
    "devices",
    "progress",
    "tables",
    "prompts",
    "prompt_copies",
    "schema",
    "spec",
    "digest",
    "binding",
    "models",
    "prompt_lengths",
    "slim",
    "passes",
    "draft",
    "decoding",
    "traces",
    "replay",
    "training",
    "profiling",
    "calibration",
    "planning",
    "evaluation",
    "pipeline",
    "cli",
    "__main__",
]
"""Lower packages first: each imports from those before it, and from itself."""

TRAINING_ONLY = ["lightning", "datasets", "sklearn", "peft", "mapie"]
MODULES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_by(path: Path) -> set[str]:
    """Modules of the package that a module imports, anywhere in its source."""
    tree = ast.parse((PACKAGE.parent / path).read_text(encoding="utf-8"))
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == "viasd_calib"}


def package_of(name: str) -> str | None:
    """The package of a module or of a name within it; None for the package itself."""
    parts = name.split(".")
    if len(parts) == 1 or (len(parts) == 2 and parts[1] in ("__version__", "__all__")):
        return None
    return parts[1]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_packages_before_it(path: Path) -> None:
    own = package_of(name_of(path))
    assert own is None or own in PACKAGES, f"{own} is no package of the layout"
    for name in imported_by(path):
        package = package_of(name)
        if package is None or package == own:
            continue
        if own is None:  # for type checkers alone: tests/unit/test_exports.py
            assert path == Path("viasd_calib/__init__.py"), f"{path} imports {name}"
            continue
        assert PACKAGES.index(package) < PACKAGES.index(own), f"{own} imports {name}"


def test_imports_are_found() -> None:
    """The rule above looks at something."""
    assert "viasd_calib.slim.forward.RoutedModel" in imported_by(Path("viasd_calib/decoding/session.py"))
    assert "viasd_calib.__version__" in imported_by(Path("viasd_calib/schema/routing_spec.py"))
    assert len(MODULES) > 20


def loaded_with(modules: list[str]) -> set[str]:
    """Which of the packages for training a fresh interpreter has loaded after importing ``modules``."""
    program = "import sys\n" + "".join(f"import {name}\n" for name in modules)
    program += f"print(*[name for name in {TRAINING_ONLY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.slow
def test_the_decoder_loads_no_training_packages() -> None:
    packages = ("slim", "passes", "draft", "decoding")
    modules = [name_of(path) for path in MODULES if len(path.parts) > 1 and path.parts[1] in packages]
    assert "viasd_calib.decoding.decoder" in modules
    # Some versions of transformers load scikit-learn themselves, where it is there.
    assert loaded_with(modules) <= loaded_with(["transformers.generation.utils"])


@pytest.mark.slow
def test_the_check_sees_a_training_package() -> None:
    assert "datasets" in loaded_with(["viasd_calib.traces.schema"])
