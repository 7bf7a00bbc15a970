"""Divergence: the share of emitted tokens that the full verifier would not have chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viasd_calib.calibration.losses.base import register
from viasd_calib.decoding.conversation import Turn
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.on_policy import read_answer


def diverging(verifier: RoutedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Which tokens q would not have chosen at their place, given the text before it: [tokens], bool.

    One teacher-forced q pass over the whole text: token t diverges where t != argmax q(. | text before t).

    Args:
        prompt: ids, at least one.
        tokens: the decoded tokens, at least one.
    """
    logits, _ = read_answer(verifier, prompt, tokens)  # [tokens, vocabulary]
    return logits.argmax(-1) != torch.tensor(tokens, device=logits.device)


def count_diverged(verifier: RoutedModel, turns: Sequence[Turn]) -> int:
    """How many tokens of decoded turns diverge."""
    return sum(int(diverging(verifier, turn.prompt_ids, turn.generation.tokens).sum()) for turn in turns)


@register(
    meaning="share of a text's tokens the full verifier would not have chosen",
    claim="of a text's tokens, on average over prompts, are not what the full verifier would have chosen",
)
def divergence(verifier: RoutedModel, turns: Sequence[Turn]) -> float:
    """Diverged tokens over emitted tokens of a prompt's turns, in [0, 1]."""
    return count_diverged(verifier, turns) / sum(len(turn.generation.tokens) for turn in turns)
