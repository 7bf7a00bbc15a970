"""``viasd cache``: where caches lie, how large they are, and emptying them."""

from __future__ import annotations

import getpass
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Literal

from rich.console import Console

from viasd_calib.errors import StorageError
from viasd_calib.files import describe_os_error
from viasd_calib.tables import new_table

CacheName = Literal["converted", "layers", "low_bits", "accelerate", "hashes", "native", "compiled", "hub", "datasets"]
"""Models converted from GGUF; layers that are read for each pass, their low-bit copies, and such that accelerate reads;
hashes of weight files; kernels of backend ``native``, and of ``torch.compile``; downloads; converted data sets."""


def cache(clear: CacheName | None = None) -> None:
    """Show where caches lie and how large they are, or empty one; what was in it is made or fetched anew when needed.

    Args:
        clear: the cache to empty: converted (models from GGUF files), layers (that are read for each pass), low_bits
            (copies of these), accelerate (layers as that reads them), hashes (of weight files), native (kernels of
            backend native), compiled (those of torch.compile), hub and datasets (of Hugging Face, shared with other
            programs).
    """
    folders = cache_folders()
    if clear is not None:
        folder = folders[clear]
        size = size_of(folder)
        try:
            if folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            raise StorageError(describe_os_error(folder, error)) from error
        print(f"emptied {clear}: {megabytes(size)} MB in {folder}")
        return
    table = new_table("caches", ["", "MB", "folder"], caption="viasd cache --clear NAME empties one")
    table.columns[-1].overflow = "fold"
    for name, folder in folders.items():
        table.add_row(name, megabytes(size_of(folder)), str(folder))
    Console(highlight=False).print(table)


def cache_folders() -> dict[CacheName, Path]:
    """The folders of the caches, as the libraries that fill them look for them."""
    everyones = _folder_of("XDG_CACHE_HOME", Path.home() / ".cache")
    home = _folder_of("HF_HOME", everyones / "huggingface")
    own = _folder_of("HF_HOME", everyones) / "viasd_calib"  # models.hashes.cache_folder is slow to load
    inductor = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return {
        "converted": own / "gguf",
        "layers": own / "layers",
        "low_bits": own / "low-bits",
        "accelerate": own / "accelerate",
        "hashes": own / "hashes",
        "native": own / "native",
        "compiled": _folder_of("TORCHINDUCTOR_CACHE_DIR", inductor),
        "hub": _folder_of("HF_HUB_CACHE", home / "hub"),
        "datasets": _folder_of("HF_DATASETS_CACHE", home / "datasets"),
    }


def _folder_of(variable: str, default: Path) -> Path:
    """The folder that an environment variable names; the default where it is unset or empty."""
    return Path(os.environ.get(variable) or default)


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; links are not followed, and what another process removes meanwhile is none."""
    size = 0
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def megabytes(size: int) -> str:
    """Bytes in millions.

    Example:
        >>> megabytes(1_234_567)
        '1.2'
    """
    return f"{size / 1e6:,.1f}"
