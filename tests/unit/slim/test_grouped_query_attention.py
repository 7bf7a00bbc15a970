"""Grouped attention is transformers' attention, without the repeated keys."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.rounding import assert_near
from tests.tiny import TINY_FAMILIES, tiny_config, tiny_model
from viasd_calib.slim.backends import prepare
from viasd_calib.slim.cache import CacheWindow, window_of_rows
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.slim.grouped_query_attention import GROUPED, group_heads, grouped_attention, grouped_mask
from viasd_calib.slim.onednn_linear import can_pack
from viasd_calib.slim.parts.adapter import adapted_layers


class Attention(nn.Module):
    """What transformers' function asks of an attention module."""

    is_causal = True

    def __init__(self, group: int) -> None:
        super().__init__()
        self.num_key_value_groups = group


@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    group=st.integers(1, 4),
    width=st.integers(1, 5),
    mask_rows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_says_what_transformers_says(
    batch: int, shared: int, group: int, width: int, mask_rows: bool, seed: int
) -> None:
    """Any mask that lets every token read something, one for all rows or one for each."""
    draw = torch.Generator().manual_seed(seed)
    slots = width + 4
    query = torch.randn(batch, shared * group, width, 8, generator=draw)
    key, value = torch.randn(2, batch, shared, slots, 8, generator=draw).unbind()
    mask = torch.rand(batch if mask_rows else 1, 1, width, slots, generator=draw) < 0.5
    mask[..., 0] = True
    ready = grouped_mask(mask, query.dtype, group)
    said = grouped_attention(Attention(group), query, key, value, ready, scaling=0.3)[0]
    expected = sdpa_attention_forward(Attention(group), query, key, value, mask, scaling=0.3)[0]
    assert_near(said, expected)


@pytest.mark.parametrize("width", [1, 5])
def test_without_a_mask_a_token_reads_all_and_several_read_their_past(width: int) -> None:
    query, (key, value) = torch.randn(1, 4, width, 8), torch.randn(2, 1, 2, 5, 8)
    said, expected = (
        attend(Attention(2), query, key, value, None)[0] for attend in (grouped_attention, sdpa_attention_forward)
    )
    torch.testing.assert_close(said, expected)


def test_a_mask_of_transformers_own_is_left_to_it() -> None:
    """Of bools, or added to the scores and different for each head."""
    query, (key, value) = torch.randn(1, 4, 3, 8), torch.randn(2, 1, 2, 5, 8)
    for mask in (torch.ones(1, 1, 3, 5).bool().tril(2), torch.randn(1, 4, 3, 5)):
        said, expected = (
            attend(Attention(2), query, key, value, mask)[0] for attend in (grouped_attention, sdpa_attention_forward)
        )
        assert torch.equal(said, expected)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN")
def test_the_packed_backend_groups_heads_of_q_and_of_slim_layers() -> None:
    """Every attention module, those of copied layers too; q says the same as before."""
    plain = tiny_model()
    model = copy.deepcopy(plain)
    slim = adapted_layers(model.get_decoder().layers, 2, 4, ["q_proj"])
    prepare([model, slim], "packed", torch.device("cpu"), torch.float32)
    used = {layer.self_attn.config._attn_implementation for layer in [*model.get_decoder().layers, *slim]}
    assert used == {GROUPED}
    assert plain.config._attn_implementation == "sdpa"
    ids = torch.randint(3, 20, (1, 6))
    said = []
    for one in (RoutedModel(plain), RoutedModel(model)):
        with torch.inference_mode():
            said.append(one.logits(one.full(ids, CacheWindow(one.new_cache(6), 0, 6, 6)).last))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in TINY_FAMILIES if tiny_config(name).model_type != "gemma2"])
def test_every_familys_masks_are_grouped(family: str) -> None:
    """Sliding layers and full ones, in pieces of several widths, of one text and of rows with starts of their own."""
    plain = tiny_model(family=family)
    grouped = copy.deepcopy(plain)
    group_heads([grouped])
    ids = torch.randint(3, 20, (2, 14))
    said = []
    for one in (RoutedModel(plain), RoutedModel(grouped)):
        rows = one.new_cache(14, batch=2).rows()
        with torch.inference_mode():
            parts = [
                one.full(ids[:, start : start + width], window_of_rows(rows, [start, start], [width, width])).last
                for start, width in ((0, 8), (8, 1), (9, 5))
            ]
            alone = one.full(ids[:1, :3], rows[0].window(11, 3)).last
        said.append(torch.cat([*(part.flatten(0, 1) for part in parts), alone[0]]))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


def test_eager_attention_stays() -> None:
    """A model that was loaded with another implementation keeps it."""
    model = copy.deepcopy(tiny_model())
    model.config._attn_implementation = "eager"
    group_heads([model])
    assert model.config._attn_implementation == "eager"


def test_capped_scores_are_left_to_transformers() -> None:
    """sdpa cannot cap scores; what transformers does about it, which its versions differ in, grouping must not hide."""
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    asked = (Attention(2), query, key, key, mask)
    try:
        expected = sdpa_attention_forward(*asked, softcap=1.5)[0]
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            grouped_attention(*asked, softcap=1.5)
    else:
        assert torch.equal(grouped_attention(*asked, softcap=1.5)[0], expected)


def test_transformers_own_forward_keeps_its_padding_mask() -> None:
    """A grouped model that is called by transformers itself still leaves padding unread."""
    plain = tiny_model()
    grouped = copy.deepcopy(plain)
    group_heads([grouped])
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.inference_mode():
        said, expected = (model(ids, attention_mask=mask).logits[:, -1] for model in (grouped, plain))
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
