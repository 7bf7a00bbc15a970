"""Names of models as users give them: which are paths, and where those lie. Nothing heavy is loaded for it."""

from __future__ import annotations

import os
from pathlib import Path

from viasd_calib.choices import SMOLLM2
from viasd_calib.errors import ModelError
from viasd_calib.shipped import check_embedded

GGUF_SUFFIX = ".gguf"
MODEL_SUFFIXES = (GGUF_SUFFIX, ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".json")
"""Ends of names of files: no hub id ends like that."""

GIVE = (
    "give a hub id, a folder or a .gguf file (with --verifier or --draft-model in place of what a spec or a fit names)"
)


def is_gguf(name_or_path: str) -> bool:
    """Whether a name is that of a GGUF file, in upper or lower case."""
    return name_or_path.lower().endswith(GGUF_SUFFIX)


def is_path(name_or_path: str) -> bool:
    """Whether a name can only be that of a file or folder, so that the hub need not be asked for it.

    Example:
        >>> [is_path(name) for name in ("./model", "/models/m", "a/b/c", "m.gguf", "Qwen/Qwen2.5-0.5B", "gpt2")]
        [True, True, True, True, False, False]
    """
    path = Path(name_or_path)
    return (
        name_or_path.startswith((".", "~"))
        or path.is_absolute()
        or bool(path.drive)
        or "\\" in name_or_path
        or name_or_path.count("/") > 1
        or name_or_path.endswith("/")
        or name_or_path.lower().endswith(MODEL_SUFFIXES)
        or path.exists()
        or ("/" in name_or_path and path.parent.is_dir())
    )


def beside(name_or_path: str, folder: Path) -> str:
    """A name as a file in ``folder`` gives it: of what lies relative to the folder, else as it is.

    Example:
        >>> beside("smollm2-135m", Path("nowhere"))
        'smollm2-135m'
    """
    if name_or_path and not Path(name_or_path).is_absolute() and (folder / name_or_path).exists():
        return str(folder / name_or_path)
    return name_or_path


def expanded(name_or_path: str) -> str:
    """A name with ``~`` written out, as a shell does that sees it without quotes."""
    return os.path.expanduser(name_or_path) if name_or_path.startswith("~") else name_or_path


def model_path(name_or_path: str) -> Path | None:
    """The folder or GGUF file that a name stands for; None for the embedded default, and for what may be the hub's.

    Raises:
        ModelError: no name, a path at which there is no model, or the embedded default where it is not installed.
    """
    if not name_or_path.strip():
        raise ModelError(f"cannot load the model {name_or_path!r}: the name is empty; {GIVE}")
    check_embedded(name_or_path)
    if name_or_path == SMOLLM2 or not is_path(name_or_path):
        return None
    path = Path(expanded(name_or_path))
    if is_gguf(name_or_path) and not path.is_dir():
        if not path.is_file():
            raise ModelError(
                f"no GGUF file at {path}; check the path, or say with --verifier or --draft-model where the file is"
            )
        return path
    if not path.exists():
        raise ModelError(f"cannot load the model {name_or_path!r}: there is no such folder; {GIVE}")
    if not path.is_dir():
        raise ModelError(
            f"cannot load the model {name_or_path!r}: it is a file; give the folder that it lies in, or a .gguf file"
        )
    return path
