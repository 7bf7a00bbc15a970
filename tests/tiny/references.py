"""What transformers itself computes with a model: the reference for decoding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from viasd_calib.decoding.transformers_baseline import with_plain_generation


def transformers_text(model: PreTrainedModel, prompt: Sequence[int], count: int, eos: Collection[int]) -> list[int]:
    """The new tokens of transformers' own greedy ``generate``, without what the model's generation settings ask."""
    ids = torch.tensor([list(prompt)])
    plain: Any = with_plain_generation(model, eos)
    out = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return list(out[0, len(prompt) :].tolist())


@torch.inference_mode()
def transformers_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The logits of transformers' own forward, [length, vocabulary]."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0]  # type: ignore[no-any-return]
