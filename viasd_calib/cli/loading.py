"""How commands come by their verifier, so that a job of several steps loads it once."""

from __future__ import annotations

from viasd_calib.cli import lazy_types
from viasd_calib.spec import DType


class SharedVerifiers:
    """Loads each verifier once, for steps of one job; nothing changes what a loaded verifier says.

    Narrow MLPs put its neurons into another order, which is noted in its modules.
    """

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, DType, str], lazy_types.Verifier] = {}

    def __call__(self, name_or_path: str, *, dtype: DType = "float32", device: str = "cpu") -> lazy_types.Verifier:
        """The verifier of that name, loaded at the first call.

        Raises:
            ModelError: nothing of that name, or a damaged file.
        """
        from viasd_calib.models import load_verifier

        key = (name_or_path, dtype, device)
        if key not in self._loaded:
            self._loaded[key] = load_verifier(name_or_path, dtype=dtype, device=device)
        return self._loaded[key]
