"""Triton kernels in modules that can be imported where Triton is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
except ImportError:
    triton = None


def jit(*scalars: str) -> Callable[[Callable[..., None]], Any]:
    """Make a function a Triton kernel that is not compiled anew for the values of these arguments.

    Without Triton it stays a function, which nothing calls.
    """

    def decorate(kernel: Callable[..., None]) -> Any:
        return kernel if triton is None else triton.jit(kernel, do_not_specialize=list(scalars))

    return decorate
