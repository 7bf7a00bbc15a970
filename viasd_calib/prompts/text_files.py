"""Bytes of a file as text: compressed or not, in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

from viasd_calib.errors import PromptError

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
GZIP = b"\x1f\x8b"
OTHER_KINDS = (
    (b"PK\x03\x04", "a ZIP archive or an Excel file; unpack it, or export the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it, or compress it with gzip"),
    (b"BZh", "compressed with bzip2; unpack it, or compress it with gzip"),
    (b"\xfd7zXZ", "compressed with xz; unpack it, or compress it with gzip"),
    (b"%PDF", "a PDF; write its prompts as one JSON object a line"),
    (b"SQLite format 3", "an SQLite database; export the table as CSV"),
)
"""First bytes of what people have too, and what it is and how it is mended."""


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it was compressed with gzip, whatever its name.

    Raises:
        PromptError: it cannot be read, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path}: {error.strerror}; check the path") from error
    if not data.startswith(GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise PromptError(f"{path}: a damaged gzip file ({error}); compress or copy it again") from error


NOT_GZIP = "it is not compressed with gzip, though its name ends in .gz: copy or compress it again"


def is_misnamed_gzip(source: str | Path) -> bool:
    """Whether a file's name says that it is compressed with gzip, and it is not; what was unpacked since is read."""
    path = Path(source)
    if path.suffix.lower() != ".gz" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GZIP)) != GZIP


def decode(name: str, data: bytes) -> str:
    """Bytes as text, without a byte-order mark.

    Raises:
        PromptError: they are no text, or in another encoding; the line is named.

    Example:
        >>> decode("p.txt", "Größe".encode("utf-16"))
        'Größe'
    """
    for first, kind in OTHER_KINDS:
        if data.startswith(first):
            raise PromptError(f"{name}: not a text file, but {kind}")
    encoding = "utf-8"
    for mark, named in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], named
            break
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        raise PromptError(
            f"{name}: not {encoding.upper()[:6].rstrip('-')} text (line {line}, byte {error.start}); "
            "save the prompts as UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise PromptError(
            f"{name}: NUL bytes from line {line} on: it is binary, or UTF-16 without a byte-order mark; "
            "save the prompts as UTF-8"
        )
    return text
