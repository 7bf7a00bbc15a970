"""Attention of several tokens at once whose query heads share keys, without a copy of the keys for each head.

Where a mask is given, transformers' ``sdpa`` repeats keys and values for every query head, in every layer and
pass: work that grows with the text beside what attention itself has to read. The heads that share keys can as
well be rows of one product (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        attention_mask: bool [1 or batch, 1, width, slots]; None is left to transformers' own ``sdpa``.
        settings: ``scaling``; with others that change the result, all is left to transformers' own ``sdpa``.

    Returns:
        [batch, width, heads, head width], and None where others return weights.
    """
    heads, shared = query.shape[1], key.shape[1]
    unusual = any(settings.get(name) is not None for name in ("softcap", "position_bias"))
    if attention_mask is None or heads == shared or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    batch, _, width, size = query.shape
    group = heads // shared
    rows = query.reshape(batch, shared, group * width, size)
    mask = attention_mask.repeat(1, 1, group, 1)  # [1 or batch, 1, group * width, slots]
    out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=settings.get("scaling"))
    return out.reshape(batch, heads, width, size).transpose(1, 2), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def group_heads(modules: Iterable[nn.Module]) -> None:
    """Let every attention module inside ``modules`` that runs ``sdpa`` run :func:`grouped_attention`, in place."""
    for module in modules:
        for part in module.modules():
            config: Any = getattr(part, "config", None)
            if getattr(config, "_attn_implementation", None) == "sdpa":
                config._attn_implementation = GROUPED
