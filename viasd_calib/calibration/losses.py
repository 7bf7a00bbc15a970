"""What a certificate bounds: losses of a decoded text against the full verifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viasd_calib.slim.forward import RoutedModel
from viasd_calib.traces.on_policy import read_answer


def diverging(verifier: RoutedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Which tokens q would not have chosen at their place: [tokens], bool.

    One teacher-forced q pass over the whole text.

    Args:
        prompt: ids, at least one.
        tokens: the decoded tokens, at least one.
    """
    logits, _ = read_answer(verifier, prompt, tokens)  # [tokens, vocabulary]
    return logits.argmax(-1) != torch.tensor(tokens, device=logits.device)
