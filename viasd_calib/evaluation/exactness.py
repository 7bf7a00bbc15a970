"""Texts that should equal the autoregressive one and do not: where, and by how little.

Passes of different widths round differently. In bfloat16 that alone turns a choice now and then where q's
two most probable tokens are nearly tied; a difference with a wider gap is a fault of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.forward import RoutedModel

NEAR_TIE = {torch.bfloat16: 4.0, torch.float16: 8.0, torch.float32: 32.0}
"""Gaps up to this many roundings of the largest logit count as ties. On SmolLM2-135M, passes of width 8, 5 and
120 over the same 2,290 places moved the gap between the two most probable tokens by at most 2.7 of them in bfloat16
and 15 in float32, whose sums are rounded as finely as their terms; float16 was not measured."""


class Difference(BaseModel):
    """The first token at which a text leaves the autoregressive one.

    Attributes:
        turn: of the prompt, from 0.
        place: of the generated tokens, from 0.
        gap: q's logit of the autoregressive token less that of the other; None where one text merely ends.
        near_tie: the gap up to which rounding explains it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_id: str
    turn: int
    place: int
    gap: float | None
    near_tie: float

    @property
    def explained(self) -> bool:
        """Whether rounding explains it."""
        return self.gap is not None and abs(self.gap) <= self.near_tie


def first_place(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first place at which two texts differ; None where they are the same.

    Example:
        >>> first_place([4, 5, 6], [4, 9]), first_place([4], [4, 9]), first_place([4], [4])
        (1, 1, None)
    """
    for place, (one, other) in enumerate(zip(tokens, reference, strict=False)):
        if one != other:
            return place
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))


def near_tie_bound(logits: Tensor, dtype: torch.dtype) -> float:
    """The gap that rounding explains at logits [vocabulary] of a model in ``dtype``."""
    return NEAR_TIE[dtype] * torch.finfo(dtype).eps * float(logits.abs().amax())


@torch.inference_mode()
def find_difference(
    verifier: RoutedModel,
    prompt_id: str,
    turn: int,
    prompt: Sequence[int],
    tokens: Sequence[int],
    reference: Sequence[int],
) -> Difference | None:
    """Where a text leaves the autoregressive one, and how nearly tied q was there; None where it does not.

    Args:
        prompt: token ids.
        tokens: the text, without the prompt.
        reference: the autoregressive text.
    """
    place = first_place(tokens, reference)
    if place is None:
        return None
    before = [*prompt, *reference[:place]]
    window = CacheWindow(verifier.new_cache(len(before)), 0, len(before), len(before))
    ids = torch.tensor([before], device=verifier.device)
    logits = verifier.logits(verifier.full(ids, window).last[0, -1]).float()  # [vocabulary]
    ends = place >= min(len(tokens), len(reference))
    gap = None if ends else float(logits[reference[place]] - logits[tokens[place]])
    return Difference(
        prompt_id=prompt_id, turn=turn, place=place, gap=gap, near_tie=near_tie_bound(logits, verifier.dtype)
    )
