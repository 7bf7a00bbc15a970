"""How commands come by their verifier, so that a job of several steps loads it once."""

from __future__ import annotations

from viasd_calib.pipeline import lazy_types
from viasd_calib.spec import DType


class SharedVerifiers:
    """Loads each verifier in float32 once, for steps of one job.

    One in another number format is loaded for each step anew: its backend changes it in place, for one engine. Narrow
    MLPs put a verifier's neurons into another order, which is noted in its modules; layers that are read for each pass
    belong to one engine.
    """

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, DType, str], lazy_types.Verifier] = {}

    def __call__(
        self, name_or_path: str, *, dtype: DType = "float32", device: str = "cpu", layers: bool = True
    ) -> lazy_types.Verifier:
        """The verifier of that name.

        Raises:
            ModelError: nothing of that name, or a damaged file.
        """
        from viasd_calib.models import load_verifier

        if dtype != "float32" or not layers:
            return load_verifier(name_or_path, dtype=dtype, device=device, layers=layers)
        key = (name_or_path, dtype, device)
        if key not in self._loaded:
            self._loaded[key] = load_verifier(name_or_path, dtype=dtype, device=device)
        return self._loaded[key]
