"""The split of prompts into fit, calibrate and test, by hash."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from viasd_calib.prompts.schema import Prompt

Split = Literal["fit", "calibrate", "test"]


class SplitShares(BaseModel):
    """Shares of the fit, calibrate and test splits.

    Example:
        >>> SplitShares(fit=0.5, calibrate=0.3, test=0.3)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        pydantic_core._pydantic_core.ValidationError: shares of the splits must sum to 1
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fit: float = Field(0.40, ge=0, le=1)
    calibrate: float = Field(0.45, ge=0, le=1)
    test: float = Field(0.15, ge=0, le=1)

    def model_post_init(self, _context: object) -> None:
        if abs(self.fit + self.calibrate + self.test - 1) > 1e-6:
            raise ValueError(
                f"shares of the splits must sum to 1, and fit {self.fit:g}, calibrate {self.calibrate:g} and test "
                f"{self.test:g} sum to {self.fit + self.calibrate + self.test:g}; give all three, as in "
                '\'{"fit": 0.6, "calibrate": 0.3, "test": 0.1}\''
            )


def split_of(sha256: str, shares: SplitShares) -> Split:
    """The split a prompt belongs to, decided by its hash alone.

    Example:
        >>> split_of("00" * 32, SplitShares()), split_of("ff" * 32, SplitShares())
        ('fit', 'test')
    """
    place = int(sha256[:12], 16) / 16**12
    if place < shares.fit:
        return "fit"
    if place < shares.fit + shares.calibrate:
        return "calibrate"
    return "test"


def select_split(prompts: Iterable[Prompt], split: Split, shares: SplitShares) -> list[Prompt]:
    """The prompts of one split, in the order of the file."""
    return [prompt for prompt in prompts if split_of(prompt.sha256, shares) == split]


def draw_prompts(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """``limit`` of the prompts, as if at random but always the same ones: those with the lowest hashes.

    A file is often sorted by task; its first lines would stand for one task alone.
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return sorted(prompts, key=lambda prompt: prompt.sha256)[:limit]


def combined_sha256(hashes: Iterable[str]) -> str:
    """One hash for a set of prompts' hashes, whatever their order and however often each is given."""
    return hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest()


def split_sha256(prompts: Iterable[Prompt]) -> str:
    """One hash for a set of prompts; the spec records it."""
    return combined_sha256(prompt.sha256 for prompt in prompts)


def step_names(prompts: Iterable[Prompt]) -> list[str]:
    """A name for each prompt by which a long job notes what it came to: its hash, whatever else is asked.

    The same text again has a number after it, so that each is decoded.

    Example:
        >>> [name[64:] for name in step_names([Prompt(id=id_, turns=["Why?"]) for id_ in "abc"])]
        ['', ' (2)', ' (3)']
    """
    seen: Counter[str] = Counter()
    names: list[str] = []
    for sha256 in (prompt.sha256 for prompt in prompts):
        seen[sha256] += 1
        names.append(sha256 if seen[sha256] == 1 else f"{sha256} ({seen[sha256]})")
    return names
