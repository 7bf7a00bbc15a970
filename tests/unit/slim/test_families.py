"""What a family's modules are called with, read off their own forwards."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache

from tests.tiny import TINY_FAMILIES, tiny_model
from viasd_calib.errors import ModelError
from viasd_calib.slim.cache import CacheWindow
from viasd_calib.slim.families import cache_argument
from viasd_calib.slim.forward import RoutedModel


class OlderAttention(nn.Module):
    """Its forward as up to transformers 5.23."""

    def forward(self, hidden_states: Tensor, past_key_values: Cache | None = None) -> None:
        """Only its signature is looked at."""


def decorated(forward: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        return forward(*args, **kwargs)

    return wrapped


class NewerAttention(nn.Module):
    """Its forward as from transformers 5.24 on, after a decorator."""

    @decorated
    def forward(self, hidden_states: Tensor, cache: Cache | None = None, use_cache: bool | None = False) -> None:
        """Only its signature is looked at."""


def test_the_name_is_that_of_the_argument_which_is_a_cache() -> None:
    assert cache_argument(OlderAttention()) == "past_key_values"
    assert cache_argument(NewerAttention()) == "cache"
    with pytest.raises(ModelError, match="Linear takes no cache arguments"):
        cache_argument(nn.Linear(1, 1))


@torch.inference_mode()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_called_by_the_name_it_knows(family: str) -> None:
    model = tiny_model(0, family)
    routed = RoutedModel(model)
    names = {cache_argument(layer.self_attn) for layer in routed.layers}
    assert names == {cache_argument(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a name that goes is warned of
        routed.full(torch.tensor([[3, 4]]), CacheWindow(routed.new_cache(2), 0, 2, 2))
