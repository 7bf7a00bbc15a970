"""What a certificate bounds: losses of a decoded text against the full verifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel


@torch.inference_mode()
def diverging(verifier: RoutedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Which tokens q would not have chosen at their place: [tokens], bool.

    One teacher-forced q pass over the whole text.

    Args:
        prompt: ids, at least one.
        tokens: the decoded tokens, at least one.
    """
    text = torch.tensor([*prompt, *tokens], device=verifier.device)  # [length]
    width = text.shape[0] - 1
    window = CacheWindow(verifier.new_cache(width), 0, width, width)
    hidden = verifier.full(text[None, :-1], window).last[0, len(prompt) - 1 :]  # [tokens, hidden]
    return verifier.logits(hidden).argmax(-1) != text[len(prompt) :]
