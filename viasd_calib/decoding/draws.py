"""Logits through transformers' logits processors, and draws on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TEXT_INDEPENDENT = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Processors that depend on the scores alone, so that the rows of a block can go through them at once."""


def ignore_text(processors: LogitsProcessorList) -> bool:
    """Whether no processor depends on the text; a subclass of one that does not may."""
    return all(type(processor) in TEXT_INDEPENDENT for processor in processors)


def process_rows(processors: LogitsProcessorList, logits: Tensor, text: Tensor) -> Tensor:
    """Put logits through processors, each row with the text it follows.

    Args:
        logits: [rows, vocabulary]; the last row follows all of ``text``, each earlier one a token less.
        text: [length], long; length >= rows.

    Returns:
        [rows, vocabulary], float32.
    """
    scores: Any = logits.float()  # transformers asks for its narrower tensor types
    ids: Any = text[None]  # [1, length]
    if ignore_text(processors):
        return processors(ids, scores) if processors else scores
    rows, length = scores.shape[0], text.shape[0]
    # Cloned, since many a processor writes into what it is given, and gates read the same logits later.
    done = [processors(ids[:, : length - rows + 1 + row], scores[row : row + 1].clone()) for row in range(rows)]
    return torch.cat(done)


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from each row of probabilities ([..., vocabulary], not all zero): [...], long.

    An exponential race: argmax of probs / Exp(1). It never waits for the device, and never takes a token
    of probability 0.

    Example:
        >>> draw(torch.tensor([[0.0, 1.0, 0.0]]), torch.Generator()).tolist()
        [1]
    """
    race = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / race.clamp(min=torch.finfo(probs.dtype).tiny)).argmax(-1)
