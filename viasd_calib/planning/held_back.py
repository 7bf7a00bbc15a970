"""Texts that a fit held back, kept beside it so that a replay can read them without the traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from viasd_calib.errors import CalibrationError
from viasd_calib.file_names import HELD_BACK_FILE
from viasd_calib.files import write_bytes
from viasd_calib.planning.reading import some_texts
from viasd_calib.traces.texts import TraceText

MOST_TOKENS = 1024
"""Generated tokens that are kept, of whole texts; a replay of more proposes hardly another policy."""


def save_held_back(texts: Sequence[TraceText], limit: int, folder: Path) -> None:
    """Write texts of up to ``MOST_TOKENS`` generated tokens, drawn by the hash of their prompts, atomically.

    Args:
        texts: one with a generated token at least.
        limit: most tokens that any of them might have had.
    """
    kept = [text for text, _ in some_texts([(text, limit) for text in texts], MOST_TOKENS)]
    tensors = {
        "ids": torch.cat([text.ids for text in kept]),
        "choices": torch.cat([text.q_ids[:, 0] for text in kept]),
        "lengths": torch.tensor([len(text.ids) for text in kept]),
        "prompt_lengths": torch.tensor([text.prompt_length for text in kept]),
        "limit": torch.tensor(limit),
    }
    write_bytes(folder / HELD_BACK_FILE, save(tensors))


def load_held_back(folder: Path) -> list[tuple[TraceText, int]]:
    """What :func:`save_held_back` wrote: texts with ids and q's choices alone, each with the most tokens that it might
    have had.

    Raises:
        CalibrationError: missing, as in the fits of earlier releases, or damaged.
    """
    path = folder / HELD_BACK_FILE
    if not path.is_file():
        raise CalibrationError(
            f"{path} is missing, which calibrate replays to find the policies worth decoding; fits of earlier "
            "releases have none: run viasd fit again"
        )
    try:
        found = load_file(path)
        lengths, prompts = found["lengths"].tolist(), found["prompt_lengths"].tolist()
        ids = found["ids"].split(lengths)
        choices = found["choices"].split([length - prompt for length, prompt in zip(lengths, prompts, strict=True)])
        limit = int(found["limit"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CalibrationError(f"{path} is damaged; run viasd fit again") from error
    return [(text_of(number, *one), limit) for number, one in enumerate(zip(ids, choices, prompts, strict=True))]


def text_of(number: int, ids: Tensor, choices: Tensor, prompt_length: int) -> TraceText:
    """A text of which a replay reads ids and choices; what a draft model proposed is for it to say anew."""
    nothing = torch.zeros(0)
    return TraceText(
        index=number, prompt_id=str(number), prompt_sha256="", task="", turn=0, ids=ids, prompt_length=prompt_length,
        q_ids=choices[:, None], q_log_probs=nothing, p_token=nothing.long(), p_depth=nothing.long(), p_top_k=None,
        p_entropy=nothing, p_margin=nothing,
    )  # fmt: skip
