"""Attention of several tokens at once whose query heads share keys, without a copy of the keys for each head.

Where a mask is given, transformers' ``sdpa`` repeats keys and values for every query head, in every layer and
pass: work that grows with the text beside what attention itself has to read. The heads that share keys can as
well be rows of one product (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "viasd_grouped_sdpa"
"""Name of this implementation among transformers' own."""


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, as transformers' attention modules call it.

    Args:
        query: [batch, heads, width, head width].
        key: [batch, key/value heads, slots, head width]; value the same.
        attention_mask: as :func:`grouped_mask` gives it, [1 or batch, 1, heads / key/value heads * width, slots]. With
            one of another shape, or none for several tokens, all is left to transformers' own ``sdpa``.
        settings: ``scaling``; with others that change the result the same is done.

    Returns:
        [batch, width, heads, head width], and None where others return weights.
    """
    batch, heads, width, size = query.shape
    shared = key.shape[1]
    rows = heads // shared * width
    whole = width == 1 if attention_mask is None else attention_mask.shape[2] == rows
    unusual = any(settings.get(name) is not None for name in ("softcap", "position_bias"))
    if heads == shared or unusual or not whole:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    out = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, shared, rows, size), key, value, attn_mask=attention_mask, scale=settings.get("scaling")
    )
    return out.reshape(batch, heads, width, size).transpose(1, 2), None


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of bools as what is added to the scores, so that it is not made anew in every layer: the same shape.

    Example:
        >>> additive_mask(torch.tensor([[True, False]]), torch.float16).tolist()
        [[0.0, -65504.0]]
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def grouped_mask(mask: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """A mask as :func:`grouped_attention` takes it: additive, once for each of the heads that share keys.

    Args:
        mask: bool [1 or batch, 1, width, slots].
        dtype: of the queries.
        group: query heads to one key/value head.

    Returns:
        [1 or batch, 1, group * width, slots].
    """
    return additive_mask(mask, dtype).repeat(1, 1, group, 1)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def group_heads(modules: Iterable[nn.Module]) -> None:
    """Let every attention module inside ``modules`` that runs ``sdpa`` run :func:`grouped_attention`, in place."""
    for module in modules:
        for part in module.modules():
            config: Any = getattr(part, "config", None)
            if getattr(config, "_attn_implementation", None) == "sdpa":
                config._attn_implementation = GROUPED
