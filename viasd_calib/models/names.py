"""What a model's name stands for."""

from __future__ import annotations

from pathlib import Path

from viasd_calib.choices import SMOLLM2
from viasd_calib.errors import ModelError
from viasd_calib.models.gguf import SMOLLM2_SHA256, converted, smollm2_file
from viasd_calib.models.hashes import cached_sha256

GGUF_SUFFIX = ".gguf"


def is_gguf(name_or_path: str) -> bool:
    """Whether a name is that of a GGUF file, in upper or lower case."""
    return name_or_path.lower().endswith(GGUF_SUFFIX)


def resolve_model(name_or_path: str) -> tuple[str, str | None]:
    """What transformers can load for a name, and the hash that identifies it if it came from a GGUF file."""
    if name_or_path == SMOLLM2:
        path = smollm2_file()
        return str(converted(path, SMOLLM2_SHA256)), f"sha256:{SMOLLM2_SHA256}"
    if is_gguf(name_or_path):
        path = Path(name_or_path)
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}; check the path, or say with --verifier where the file is")
        digest = cached_sha256(path)
        return str(converted(path, digest)), f"sha256:{digest}"
    return name_or_path, None
