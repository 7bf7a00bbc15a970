"""Whether every public object has its place on a reference page; run by ``make docs`` on the pages that it built."""

from __future__ import annotations

import ast
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from generate import ROOT, modules


def public_objects() -> Iterator[str]:
    """Dotted names of the public classes and functions of the package."""
    for module, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                yield f"{module}.{node.name}"


def documented(inventory: Path) -> set[str]:
    """Names of the objects in a Sphinx inventory (objects.inv, version 2)."""
    data = inventory.read_bytes()
    start = 0
    for _ in range(4):  # lines of the heading
        start = data.index(b"\n", start) + 1
    return {line.split()[0] for line in zlib.decompress(data[start:]).decode().splitlines()}


def main() -> int:
    """Print what is missing; the exit status is 0 where nothing is."""
    missing = sorted(set(public_objects()) - documented(ROOT / "site" / "objects.inv"))
    for name in missing:
        print(f"{name} has no place on a reference page: give it a docstring, or make it private", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
