"""Prompts in the words of the tiny tokenizer, and traces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from tests.tiny.folders import TinyFolder
from tests.tiny.models import VOCAB, tiny_model
from tests.tiny.tokenizers import SPECIAL
from viasd_calib.draft.lookup import PromptLookup
from viasd_calib.models import load_verifier
from viasd_calib.prompts import Prompt
from viasd_calib.replay.teacher import read_text
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.capture import capture_traces
from viasd_calib.traces.folder import CaptureSettings
from viasd_calib.traces.texts import TraceText


def tiny_prompts(count: int, *, turns: int = 1, longest: int = 6) -> list[Prompt]:
    """Prompts in the words of the tiny tokenizer."""
    rng = random.Random(count)
    return [
        Prompt(
            id=f"tiny/{number}",
            task=rng.choice(["qa", "coding"]),
            turns=[
                " ".join(f"w{rng.randrange(VOCAB - len(SPECIAL))}" for _ in range(rng.randint(1, longest)))
                for _ in range(rng.randint(1, turns))
            ],
        )
        for number in range(count)
    ]


def tiny_traces(verifier: TinyFolder, folder: Path, count: int, **settings: Any) -> Path:
    """Fill ``folder`` with the verifier's answers to ``count`` prompts, and what prompt lookup proposes on them."""
    prompts, chosen = tiny_prompts(count), CaptureSettings(**settings)
    capture_traces(load_verifier(str(verifier)), PromptLookup(), "prompt_lookup", prompts, folder, chosen)
    return folder


def tiny_texts(count: int, length: int = 40, model: RoutedModel | None = None) -> list[TraceText]:
    """Random texts after prompts of five tokens, with what ``model``, or else ``tiny_model()``, predicts on them."""
    model, nothing = model or RoutedModel(tiny_model()), torch.empty(0)
    found = []
    for index in range(count):
        ids = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(index))
        said = model.logits(read_text(model, ids[None, :-1])[0].last)[0, 4:].log_softmax(-1).topk(8)
        found.append(
            TraceText(
                index=index, prompt_id=str(index), prompt_sha256=f"{index:064x}", task="qa", turn=0,
                ids=ids, prompt_length=5,
                q_ids=said.indices, q_log_probs=said.values,
                p_token=nothing, p_depth=nothing, p_top_k=None, p_entropy=nothing, p_margin=nothing,
            )
        )  # fmt: skip
    return found
