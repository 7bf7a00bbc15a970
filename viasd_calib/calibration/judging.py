"""How q judges a decoded text: one teacher-forced pass, and at each token how far it lies below q's own choice.

A pass over a whole text rounds otherwise than the narrow passes that wrote it: where q's two most probable tokens are
nearly tied, even q's own text differs from its choice now and then. So a token counts as q's choice where it lies below
that by no more than a gap that rounding explains (:mod:`viasd_calib.calibration.floor` measures it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viasd_calib.decoding import acceptance
from viasd_calib.decoding.conversation import Turn
from viasd_calib.prompts import Prompt
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.on_policy import read_answer


@dataclass(frozen=True)
class JudgedPrompt:
    """A prompt that was answered, and what q says of the answers: all that a certificate loss may look at.

    Attributes:
        prompt: with its reference answer, if it has one.
        turns: what the decoder was given and wrote, turn by turn.
        deficits: of each turn, log q(q's choice) - log q(token) at each token: [tokens] each, float32, in nats, 0 at
            q's choice.
        rounding_gap: deficits up to it, in nats, are those of q's own choices, but for rounding.
    """

    prompt: Prompt
    turns: Sequence[Turn]
    deficits: Sequence[Tensor]
    rounding_gap: float = 0.0

    @property
    def all_deficits(self) -> Tensor:
        """Those of all turns, one after the other: [tokens]."""
        return torch.cat([*self.deficits])

    @property
    def diverged(self) -> Tensor:
        """Which tokens q would not have chosen, of all turns: [tokens], bool."""
        return self.all_deficits > self.rounding_gap


def token_deficits(verifier: RoutedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """How far each token of an answer lies below q's choice at its place, given the text before it.

    One teacher-forced q pass over the whole text: max_v log q(v) - log q(token), which is a difference of logits.

    Args:
        prompt: ids, at least one.
        tokens: the decoded tokens, at least one.

    Returns:
        [tokens], float32, at least 0.
    """
    logits = read_answer(verifier, prompt, tokens)[0]  # [tokens, vocabulary]
    return acceptance.token_deficits(logits, torch.tensor(tokens, device=logits.device))


def judge(verifier: RoutedModel, prompt: Prompt, turns: Sequence[Turn], rounding_gap: float = 0.0) -> JudgedPrompt:
    """Read the decoded turns of a prompt with q."""
    return JudgedPrompt(prompt, turns, [*_deficits(verifier, turns)], rounding_gap)


def count_diverged(verifier: RoutedModel, turns: Sequence[Turn], rounding_gap: float = 0.0) -> int:
    """How many tokens of decoded turns q would not have chosen."""
    return sum(int((deficits > rounding_gap).sum()) for deficits in _deficits(verifier, turns))


def _deficits(verifier: RoutedModel, turns: Sequence[Turn]) -> Iterator[Tensor]:
    """Those of each turn, [tokens]."""
    for turn in turns:
        yield token_deficits(verifier, turn.prompt_ids, turn.generation.tokens)
