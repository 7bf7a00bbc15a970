"""How commands come by their verifier, so that a job of several steps loads it once."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from viasd_calib.decoding.decoder import Engine, assemble
from viasd_calib.models import Verifier, load_verifier
from viasd_calib.spec import DType, load_spec


class LoadVerifier(Protocol):
    """What :func:`viasd_calib.models.load_verifier` does, or something that remembers what it did."""

    def __call__(self, name_or_path: str, *, dtype: DType = "float32", device: str = "cpu") -> Verifier:
        """The verifier of that name."""
        ...


class SharedVerifiers:
    """Loads each verifier once, for steps of one job; nothing changes a loaded verifier."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, DType, str], Verifier] = {}

    def __call__(self, name_or_path: str, *, dtype: DType = "float32", device: str = "cpu") -> Verifier:
        """The verifier of that name, loaded at the first call.

        Raises:
            ModelError: nothing of that name, or a damaged file.
        """
        key = (name_or_path, dtype, device)
        if key not in self._loaded:
            self._loaded[key] = load_verifier(name_or_path, dtype=dtype, device=device)
        return self._loaded[key]


def open_engine(spec_path: str, verifier: str | None, dtype: DType | None, device: str, load: LoadVerifier) -> Engine:
    """Everything that a spec names, with its verifier from ``load``.

    Raises:
        SpecError: the spec is damaged, or was made for another verifier or tokenizer.
        ModelError: a model is missing or damaged.
    """
    spec = load_spec(spec_path)
    loaded = load(verifier or spec.verifier.name_or_path, dtype=dtype or spec.verifier.dtype, device=device)
    return assemble(spec, Path(spec_path).parent, loaded)
