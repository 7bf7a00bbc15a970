"""The kernels in each way that they are compiled and run on this CPU; one that has all of them runs each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from viasd_calib.slim.native import library

WITHOUT_BFLOAT16 = "-mno-avx512bf16", "-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile"
WITHOUT_AVX512 = "-mno-avx512f", *WITHOUT_BFLOAT16
WAYS = {
    "amx": ("amx_int8", 1, ()),
    "avx512": ("avx512_bf16", 0, ()),
    "avx512 without bf16": ("avx512_vnni", 0, WITHOUT_BFLOAT16),
    "avx2": ("avx2", 0, WITHOUT_AVX512),
}
"""The instructions that a way needs as Linux names them, whether AMX may be used, and flags of the compiler."""


@pytest.fixture(params=WAYS, scope="module", autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """AMX, vectors of 512 bits, those of a CPU that multiplies no bfloat16 numbers, and vectors of 256 bits."""
    if not library.cpu_has_kernels():
        yield
        return
    needed, amx, flags = WAYS[request.param]
    if needed not in library.cpu_flags():
        pytest.skip(f"this CPU has no {needed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FLAGS", (*library.FLAGS, *flags))
        library.kernels.cache_clear()
        library.kernels().viasd_use_amx(amx)
        yield
    library.kernels.cache_clear()
