"""Numbers that options take, with their ranges: what lies outside is refused while the words are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
"""Of tokens, prompts, texts."""

OptionalCount = Annotated[int, Field(ge=0)]
"""The same, where 0 means none or all."""

Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""What torch takes as a seed."""

Share = Annotated[float, Field(gt=0, le=1)]
"""Of a mass or a cost; nothing is none."""

Inside = Annotated[float, Field(gt=0, lt=1)]
"""Strictly between 0 and 1."""

ShareOrNone = Annotated[float, Field(ge=0, le=1)]
"""A share that may be none."""

Nonnegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

DraftLength = Annotated[int, Field(ge=0, le=64)]
MaxPending = Annotated[int, Field(ge=0, le=256)]
"""As in :class:`viasd_calib.spec.Decoding`."""
