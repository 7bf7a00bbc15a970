"""Certificates that could have been."""

from __future__ import annotations

from typing import Any

from viasd_calib.spec import Certificate

SPLITS = {"fit": "1" * 64, "calibrate": "2" * 64, "test": "3" * 64}


def make_certificate(bound: float | None = 0.02, **changes: Any) -> Certificate:
    """A certificate of 300 prompts with few losses; one that bounds nothing where ``bound`` is None."""
    entries: dict[str, Any] = {
        "bound": bound,
        "confidence": 0.95,
        "procedure": "learn-then-test",
        "candidates_tested": 4,
        "n_prompts": 300,
        "max_new_tokens": 64,
        "split_sha256": SPLITS,
        "observed": None if bound is None else 0.1 * bound,
        "p_value": None if bound is None else 0.04,
        "note": "nothing certified" if bound is None else "",
    }
    return Certificate(**{**entries, **changes})
