"""What the parts of a spec have in common: entries that are refused, and references to tensor files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Audit = Literal["strict", "tolerant", "off"]
DType = Literal["float32", "bfloat16", "float16"]
WeightFormat = Literal["int8", "int4"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Revision = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64}|[^:]+)$")]
"""A commit, branch or tag, which has no colon, or the hash of a file."""
Share = Annotated[float, Field(ge=0, le=1)]


class SpecModel(BaseModel):
    """Base of every part of a spec: unknown entries and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ShortHash = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Of a prompt's text: enough digits to tell millions apart (:mod:`viasd_calib.prompt_copies`)."""


class HashedFile(SpecModel):
    """A file, by a path relative to the spec's folder, and its hash."""

    path: str = Field(description="of the file, from the spec's folder; it stays inside that folder")
    sha256: Sha256 = Field(description="of the file, hexadecimal")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path:
            raise ValueError("must be a path inside the spec's folder")
        return path


class TensorFile(HashedFile):
    """A safetensors file, by a path relative to the spec's folder, and its hash."""

    path: str = Field(description="of the safetensors file, from the spec's folder; it stays inside that folder")


def refuse(problems: Iterable[str]) -> None:
    """Refuse what a validator found, if it found anything.

    Raises:
        ValueError: with a line for each problem; a validation error of pydantic holds one message a validator.
    """
    lines = "\n".join(problems)
    if lines:
        raise ValueError(lines)
