"""The kernels in each way that they are compiled and run; a CPU that has one way alone runs it more than once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from viasd_calib.slim.native import library

WITHOUT_BFLOAT16 = "-mno-avx512bf16", "-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile"
WAYS = {"amx": (1, ()), "avx512": (0, ()), "avx512 without bf16": (0, WITHOUT_BFLOAT16)}


@pytest.fixture(params=WAYS, scope="module", autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """AMX, vectors alone, and vectors of a CPU that multiplies no bfloat16 numbers."""
    if not library.cpu_has_kernels():
        yield
        return
    amx, flags = WAYS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FLAGS", (*library.FLAGS, *flags))
        library.kernels.cache_clear()
        library.kernels().viasd_use_amx(amx)
        yield
    library.kernels.cache_clear()
