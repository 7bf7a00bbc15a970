"""Hashes by which a spec knows a verifier and its tensor files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IGNORED_CONFIG_KEYS = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "use_cache",
        "architectures",
    }
)
"""Entries of a model's configuration that say nothing of what it computes."""


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of a model configuration, without the entries that do not change what it computes.

    Example:
        >>> config_sha256({"hidden_size": 8, "dtype": "float32"}) == config_sha256({"hidden_size": 8})
        True
    """
    kept = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_sha256(vocabulary: Mapping[str, int], chat_template: str | None) -> str:
    """Hash of a tokenizer: its vocabulary and its chat template."""
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items()), ensure_ascii=False).encode())
    digest.update((chat_template or "").encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
