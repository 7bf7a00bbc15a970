"""What a spec says of its loss bound, and of what was measured with it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from viasd_calib.schema.base import Sha256, Share, SpecModel


class Certificate(SpecModel):
    """Which loss bound holds, how sure, and on what data it was shown.

    ``bound`` is null where nothing could be certified, or exact decoding was faster; the audit is then ``strict``.
    """

    loss: Literal["divergence"] = "divergence"
    bound: Share | None
    confidence: float = Field(gt=0, lt=1)
    procedure: str
    candidates_tested: int = Field(ge=0)
    n_prompts: int = Field(ge=0)
    max_new_tokens: int = Field(gt=0)
    split_sha256: dict[Literal["fit", "calibrate", "test"], Sha256]
    observed: float | None
    p_value: float | None
    note: str = ""


class Evidence(SpecModel):
    """What was measured with this spec, and where."""

    acceptance_length: float
    rejection_rate: Share
    full_passes_per_token: float
    tier_shares: dict[Literal["accept", "regenerate", "escalate"], Share]
    speedup_vs: dict[Literal["autoregressive", "speculative"], float]
    hardware: dict[str, Any]
