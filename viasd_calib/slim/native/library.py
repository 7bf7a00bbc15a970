"""The compiled kernels: compiled once on a machine with its own C++ compiler, and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from viasd_calib.errors import ModelError
from viasd_calib.models import cache_folder
from viasd_calib.progress import steps

SOURCES = (
    *("attention.h", "linear.h", "products.h", "products_avx2.h", "products_avx512.h"),
    *("statistics.h", "vectors.h", "vectors_avx2.h", "vectors_avx512.h", "passes.cpp"),
)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
NEEDED = ("avx2", "fma")
"""Instructions that a CPU must have for the kernels, as Linux names them; AVX-512 with VNNI, BF16 and AMX are used
where they are there."""
SECONDS = 300
"""That compiling may take at most."""


class LinearStruct(ctypes.Structure):
    """``Linear`` of linear.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("format", "inputs", "outputs", "tile_pairs", "input_bits", "padding")),
        *((name, ctypes.c_void_p) for name in ("weight", "steps", "lowest", "bias")),
    )


class LayerStruct(ctypes.Structure):
    """``Layer`` of passes.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, LinearStruct) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_int32) for name in ("index", "window")),
    )


class ModelStruct(ctypes.Structure):
    """``Model`` of passes.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("hidden", "heads", "shared_heads", "head_width", "neurons")),
        ("activation", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("epsilon", "scaling")),
    )


class CacheStruct(ctypes.Structure):
    """``Cache`` of passes.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("layer_stride", "text_stride", "capacity")),
    )


class TextStruct(ctypes.Structure):
    """``Text`` of passes.cpp."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("number", "start", "width"))


class DrafterStruct(ctypes.Structure):
    """``Drafter`` of passes.cpp."""

    _fields_ = (
        *((name, LinearStruct) for name in ("from_token", "from_own", "head")),
        *((name, ctypes.c_void_p) for name in ("embeddings", "norm", "ones")),
        *((name, ctypes.c_float) for name in ("token_size", "epsilon", "own_epsilon")),
    )


@cache
def cpu_flags() -> frozenset[str]:
    """Names of the CPU's instructions; none where Linux does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def compiler() -> str | None:
    """The C++ compiler: what ``CXX`` names, else GCC; None where there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++")


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernels lack on this machine, in words; None where nothing is lacking.

    Example:
        >>> why_no_kernels(torch.device("cpu"), torch.float32)
        'they calculate in bfloat16, not in float32'
    """
    if device.type != "cpu":
        return f"device {device} is no CPU"
    if dtype != torch.bfloat16:
        return f"they calculate in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"they are written for Linux on x86-64, not for {platform.system()} on {platform.machine()}"
    lacking = [name for name in NEEDED if name not in cpu_flags()]
    if lacking:
        return f"this CPU has no {', '.join(lacking)}"
    if compiler() is None and not _place().exists():
        return "there is no C++ compiler: install g++, or name one by CXX"
    return None


@cache
def cpu_has_kernels() -> bool:
    """Whether the kernels run on this machine's CPU, in bfloat16."""
    return why_no_kernels(torch.device("cpu"), torch.bfloat16) is None


@cache
def kernels() -> Any:
    """The library, compiled where it is not there yet.

    Raises:
        ModelError: it cannot be compiled or loaded; the compiler's own words are in the message.
    """
    place = _place()
    if not place.exists():
        with steps("compile", 1, "kernels") as running:
            _compile(place)
            running.advance()
    try:
        library = ctypes.CDLL(str(place))
    except OSError as error:
        raise ModelError(
            f"compiled kernels cannot be loaded: {error}; empty them with viasd cache --clear native"
        ) from error
    pointer, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    library.viasd_run.argtypes = [
        *(pointer, pointer, number, pointer, pointer, number),
        *(pointer, pointer, pointer, number),
    ]
    library.viasd_linear.argtypes = [pointer, pointer, number, number, pointer, real, pointer, number, number, number]
    library.viasd_statistics.argtypes = [
        *(pointer, number, number, pointer, number),
        *(pointer, pointer, pointer, number),
    ]
    library.viasd_draft.argtypes = [
        *(pointer, pointer, pointer, number, pointer, number, number),
        *(pointer, pointer, number, pointer, pointer, pointer),
        *(pointer, number, pointer, number),
    ]
    library.viasd_largest.argtypes = [pointer, number, number, pointer, pointer]
    library.viasd_norm.argtypes = [pointer, number, number, pointer, real, pointer]
    for name in ("viasd_statistics", "viasd_largest", "viasd_norm"):
        getattr(library, name).restype = None
    library.viasd_use_amx(1)
    return library


def _place() -> Path:
    """Where the library lies: by its sources, how they are compiled, and the CPU they are compiled for."""
    known = hashlib.sha256(" ".join((*FLAGS, *sorted(cpu_flags()))).encode())
    for name in SOURCES:
        known.update((Path(__file__).parent / name).read_bytes())
    return cache_folder() / "native" / f"kernels-{known.hexdigest()[:20]}.so"


def _compile(place: Path) -> None:
    """Compile into a temporary file, and put it into its place at once: processes may compile at the same time.

    Raises:
        ModelError: the compiler refuses, or the folder cannot be written.
    """
    program = compiler()
    if program is None:
        raise ModelError("backend native needs a C++ compiler once: install g++, or choose another backend")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / place.name
            source = Path(__file__).parent / SOURCES[-1]
            subprocess.run(
                [program, *FLAGS, str(source), "-o", str(made)], check=True, capture_output=True, timeout=SECONDS
            )
            os.replace(made, place)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        reason = next(
            (line for line in lines if "error" in line), lines[0] if lines else f"exit code {error.returncode}"
        )
        raise ModelError(f"{program} cannot compile the kernels ({reason}); choose another backend") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"the kernels cannot be compiled ({error}); choose another backend") from error
