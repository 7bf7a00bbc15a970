"""Triton kernels without a GPU: run interpreted in another process, and compiled for GPUs that need not be there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ALIGNED = [["tt.divisibility", 16]]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def in_a_new_process(program: list[str], **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fresh_module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> Any:
    """A module of kernels, which are compiled and not interpreted; what is compiled goes into ``folder``."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("TRITON_INTERPRET is set")
    return importlib.import_module(name)


def compiled_for(
    capability: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    even: Collection[str] = (),
) -> Any:
    """A kernel compiled for a GPU that need not be there.

    Args:
        types: of arguments; those that are not named are integers of 32 bits.
        even: arguments that are multiples of 16, beside all pointers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in even]
    source = ASTSource(kernel, signature, constants, {(kernel.arg_names.index(name),): ALIGNED for name in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def assert_is_for(compiled: Any, capability: int) -> None:
    """That a kernel is machine code for this capability."""
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 1000
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
