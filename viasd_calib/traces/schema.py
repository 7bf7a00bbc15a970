"""The layout of a trace shard: one row a text, lists over its generated tokens."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Features, Sequence, Value

from viasd_calib.decoding.top_k import TopKStatistics

SIDES = ("q", "p")
"""Prefixes of the columns that tell what the verifier and the draft model top_k."""


def trace_features() -> Features:
    """Columns of a shard.

    A text of n tokens has lists of n; ``*_ids`` and ``*_log_probs`` are flattened, k for each token.
    ``normalised_sha256`` is of the prompt's text (:mod:`viasd_calib.prompt_copies`); shards of earlier releases have
    none. ``p_depth`` counts the drafted, unverified tokens before each draft.
    """
    columns: dict[str, Any] = {
        "prompt_id": Value("string"),
        "prompt_sha256": Value("string"),
        "normalised_sha256": Value("string"),
        "task": Value("string"),
        "turn": Value("int32"),
        "prompt_tokens": Sequence(Value("int32")),
        "tokens": Sequence(Value("int32")),
        "p_token": Sequence(Value("int32")),
        "p_depth": Sequence(Value("int8")),
    }
    for side in SIDES:
        columns[f"{side}_ids"] = Sequence(Value("int32"))
        columns[f"{side}_log_probs"] = Sequence(Value("float16"))
        columns[f"{side}_log_sum_exp"] = Sequence(Value("float32"))
        columns[f"{side}_entropy"] = Sequence(Value("float16"))
        columns[f"{side}_margin"] = Sequence(Value("float16"))
    return Features(columns)


def top_k_columns(side: str, top_k: TopKStatistics | None) -> dict[str, list[float] | list[int]]:
    """Columns of one side of a text; all empty where that side has no distribution."""
    if top_k is None:
        return {f"{side}_{name}": [] for name in ("ids", "log_probs", "log_sum_exp", "entropy", "margin")}
    lowest = torch.finfo(torch.float16).min
    return {
        f"{side}_ids": top_k.ids.flatten().tolist(),
        f"{side}_log_probs": top_k.log_probs.clamp(min=lowest).half().flatten().tolist(),
        f"{side}_log_sum_exp": top_k.log_sum_exp.tolist(),
        f"{side}_entropy": top_k.entropy.half().tolist(),
        f"{side}_margin": top_k.margin.clamp(max=-lowest).half().tolist(),
    }
