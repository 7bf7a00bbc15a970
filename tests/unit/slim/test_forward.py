from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.rounding import assert_near
from tests.strategies import families, routes, token_lists
from tests.tiny import (
    LAYERS,
    SLIDING,
    TINY_FAMILIES,
    VOCAB,
    longrope_config,
    make_model,
    tiny_config,
    tiny_model,
    transformers_logits,
)
from viasd_calib.errors import ModelError, PromptError
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.families import FAMILIES, cache_argument, family_of, layer_types_of
from viasd_calib.slim.forward import RoutedModel, sublayers_of
from viasd_calib.slim.plan import share_parameters
from viasd_calib.spec import Route

TEXT = [5, 1, 17, 3, 3, 9, 20, 11, 8, 2, 14, 6]


def row(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def over(cache: SharedCache, start: int, width: int) -> CacheWindow:
    return CacheWindow(cache, start, width, start + width)


def without_sublayers(model: PreTrainedModel, route: Route) -> PreTrainedModel:
    """A copy of a model in which the skipped sublayers add nothing to the residual stream."""
    smaller = copy.deepcopy(model)
    layers = smaller.get_decoder().layers
    for index in route.attention_skip:
        layers[index].self_attn.o_proj.weight.zero_()
    for index in route.mlp_skip:
        layers[index].mlp.down_proj.weight.zero_()
    return smaller


def test_every_family_has_a_tiny_model() -> None:
    """Longer than its window where it has one, so that the tests below see it slide."""
    assert len(TEXT) > 2 * SLIDING
    assert {config.model_type for config, _ in TINY_FAMILIES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.inference_mode()
def test_full_pass_is_transformers_own(family: str) -> None:
    model = tiny_model(0, family)
    routed = RoutedModel(model)
    expected = transformers_logits(model, TEXT)
    cache = routed.new_cache(len(TEXT))
    whole = routed.logits(routed.full(row(TEXT), over(cache, 0, len(TEXT))).last[0])
    assert_near(whole, expected)
    cache = routed.new_cache(len(TEXT))
    pieces = [
        routed.logits(routed.full(row(TEXT[start : start + width]), over(cache, start, width)).last[0])
        for start, width in ((0, 5), (5, 1), (6, 4), (10, 2))
    ]
    assert_near(torch.cat(pieces), expected)


@torch.inference_mode()
def test_longrope_holds_up_to_its_first_context() -> None:
    """Beyond it the model turns earlier positions anew, which a cache cannot follow: there is no room for more."""
    model = make_model(longrope_config(len(TEXT)))
    routed = RoutedModel(model)
    cache = routed.new_cache(len(TEXT))
    pieces = [
        routed.logits(routed.full(row(TEXT[start : start + 4]), over(cache, start, 4)).last[0]) for start in (0, 4, 8)
    ]
    assert_near(torch.cat(pieces), transformers_logits(model, TEXT))
    with pytest.raises(PromptError, match="context holds 12"):
        routed.new_cache(len(TEXT) + 1)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "falcon_h1"])
def test_an_unknown_family_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=rf"'{family}' are not supported; supported are: gemma2, gemma3_text, llama"):
        family_of(SimpleNamespace(model_type=family))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_model_that_reads_ahead_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="attends in both directions"):
        family_of(tiny_config(family, use_bidirectional_attention=True))


def test_layers_of_a_type_that_is_not_known_are_refused() -> None:
    config = SimpleNamespace(model_type="qwen3", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ModelError, match=r"'chunked_attention' are not supported.*full_attention, sliding_attention"):
        layer_types_of(config)


def test_a_window_without_a_length_is_refused() -> None:
    config = tiny_config("qwen2_sliding", use_sliding_window=False)
    with pytest.raises(ModelError, match=r"sliding_window gives them no length; set it .*use_sliding_window"):
        layer_types_of(config)


def test_layers_slide_where_the_model_slides_them() -> None:
    every, none = ["sliding_attention"] * 2, ["full_attention"] * 2
    assert layer_types_of(tiny_config("mistral_sliding", layers=2)) == every
    assert layer_types_of(tiny_config("phi3_sliding", layers=2)) == every
    assert layer_types_of(tiny_config("phi3", layers=2)) == layer_types_of(tiny_config("mistral", layers=2)) == none
    assert layer_types_of(tiny_config("llama", layers=2, sliding_window=4)) == none  # a Llama does not read that
    mixed = tiny_config("qwen2", layers=2, layer_types=None, use_sliding_window=True, sliding_window=4)
    assert layer_types_of(mixed) == none
    mixed = tiny_config("qwen3", layer_types=None, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert layer_types_of(mixed) == [*none, *every]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral_sliding"])
@torch.inference_mode()
def test_eager_attention_masks_as_sdpa_does(family: str) -> None:
    """Eager attention adds its mask to the scores, so that one of bools would raise them by one."""
    model = copy.deepcopy(tiny_model(0, family))
    expected = transformers_logits(model, TEXT)
    model.set_attn_implementation("eager")
    routed = RoutedModel(model)
    whole = routed.full(row(TEXT), over(routed.new_cache(len(TEXT)), 0, len(TEXT))).last[0]
    assert_near(routed.logits(whole), expected)


def test_an_attention_that_takes_other_masks_is_refused() -> None:
    model = copy.deepcopy(tiny_model())
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="'flash_attention_2' is not supported; load the model with 'sdpa' or 'eager'"):
        RoutedModel(model)


@given(family=families(), text=token_lists(1, 12))
@torch.inference_mode()
def test_an_empty_route_is_the_full_verifier(family: str, text: list[int]) -> None:
    routed = RoutedModel(tiny_model(0, family), Route())
    window = over(routed.new_cache(len(text)), 0, len(text))
    slim = routed.slim(row(text), window).last
    assert torch.equal(slim, routed.full(row(text), over(routed.new_cache(len(text)), 0, len(text))).last)


@settings(max_examples=40)
@given(family=families(), route=routes(), text=token_lists(2, 12), data=st.data())
@torch.inference_mode()
def test_slim_reads_the_full_verifiers_past(family: str, route: Route, text: list[int], data: st.DataObject) -> None:
    """Against transformers: the model with silenced sublayers, on a cache that the whole model filled."""
    model = tiny_model(0, family)
    routed = RoutedModel(model, route)
    seen = data.draw(st.integers(0, len(text) - 1))
    cache, past = routed.new_cache(len(text)), DynamicCache(config=model.config)
    if seen:
        routed.full(row(text[:seen]), over(cache, 0, seen))
        model(input_ids=row(text[:seen]), **{cache_argument(model): past})
    slim = routed.logits(routed.slim(row(text[seen:]), over(cache, seen, len(text) - seen)).last[0])
    silenced = without_sublayers(model, route)
    expected = silenced(input_ids=row(text[seen:]), **{cache_argument(model): past}).logits[0]
    assert_near(slim, expected)


@given(family=families(), route=routes(), text=token_lists(3, 12), data=st.data())
@torch.inference_mode()
def test_a_slim_pass_leaves_no_trace(family: str, route: Route, text: list[int], data: st.DataObject) -> None:
    """It writes after what q has seen only, and q over the same slots says what it says without it."""
    routed = RoutedModel(tiny_model(0, family), route)
    exact = data.draw(st.integers(1, len(text) - 2))
    rest = row(text[exact:])
    plain, mixed = routed.new_cache(len(text)), routed.new_cache(len(text))
    for cache in (plain, mixed):
        routed.full(row(text[:exact]), over(cache, 0, exact))
        cache.mark_exact(exact)
    before = mixed.keys.clone(), mixed.values.clone()
    routed.slim(torch.flip(rest, [1]), over(mixed, exact, rest.shape[1]))
    assert torch.equal(mixed.keys[..., :exact, :], before[0][..., :exact, :])
    assert torch.equal(mixed.values[..., :exact, :], before[1][..., :exact, :])
    for layer in route.attention_skip:
        assert torch.equal(mixed.keys[layer], before[0][layer])
    with_trace = routed.full(rest, over(mixed, exact, rest.shape[1])).last
    without = routed.full(rest, over(plain, exact, rest.shape[1])).last
    assert torch.equal(with_trace, without)
    assert torch.equal(mixed.keys, plain.keys)
    assert torch.equal(mixed.values, plain.values)


@settings(max_examples=30)
@given(
    family=families(),
    route=routes(),
    texts=st.lists(token_lists(3, 10), min_size=1, max_size=4),
    slim=st.booleans(),
)
@torch.inference_mode()
def test_rows_with_starts_of_their_own_are_single_texts(
    family: str, route: Route, texts: list[list[int]], slim: bool
) -> None:
    """Two last tokens of each text at once, after pasts of different lengths."""
    routed = RoutedModel(tiny_model(0, family), route)
    longest = max(map(len, texts))
    starts = [len(text) - 2 for text in texts]
    cache = routed.new_cache(longest, batch=len(texts))
    padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    routed.full(padded, over(cache, 0, longest))
    step = routed.slim if slim else routed.full
    window = CacheWindow(cache, torch.tensor(starts), 2, longest)
    states = step(torch.tensor([text[-2:] for text in texts]), window).last
    for place, (text, start) in enumerate(zip(texts, starts, strict=True)):
        own = routed.new_cache(len(text))
        routed.full(row(text[:start]), over(own, 0, start))
        expected = step(row(text[start:]), over(own, start, 2)).last
        assert_near(states[place], expected[0])


@given(route=routes())
def test_a_route_keeps_what_it_does_not_skip_in_order(route: Route) -> None:
    routed = RoutedModel(tiny_model(), route)
    kept = [(s.index, s.kind) for s in sublayers_of(routed.layers, routed.layer_types, route)]
    every = [(index, kind) for index in range(LAYERS) for kind in ("attention", "mlp")]
    skipped = {(i, "attention") for i in route.attention_skip} | {(i, "mlp") for i in route.mlp_skip}
    assert kept == [sublayer for sublayer in every if sublayer not in skipped]


def test_two_routes_share_one_verifier() -> None:
    """A route belongs to the instance, never to the model."""
    model = tiny_model()
    one, other = RoutedModel(model, Route(attention_skip=[0])), RoutedModel(model, Route(mlp_skip=[0, 1]))
    assert len(one.slim_sublayers) == 2 * LAYERS - 1
    assert len(other.slim_sublayers) == 2 * LAYERS - 2
    assert len(one.full_sublayers) == len(other.full_sublayers) == 2 * LAYERS


def test_shared_copies_hold_the_very_same_parameters() -> None:
    layer = tiny_model().get_decoder().layers[0]
    twin = share_parameters(layer)
    assert twin is not layer
    assert twin.self_attn is not layer.self_attn
    pairs = list(zip(layer.parameters(), twin.parameters(), strict=True))
    assert pairs
    assert all(one is other for one, other in pairs)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_head_rows_are_those_of_the_output(family: str) -> None:
    routed = RoutedModel(tiny_model(0, family))
    ids = torch.tensor([3, VOCAB - 1])
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(routed.soft_cap(hidden @ routed.head_rows(ids).T), routed.logits(hidden)[:, ids])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_the_size_of_embeddings_is_that_of_what_is_embedded(family: str) -> None:
    routed = RoutedModel(tiny_model(0, family))
    every = routed.embed(torch.arange(VOCAB)[None])
    torch.testing.assert_close(routed.embedding_size(), every.square().mean().sqrt())


@given(
    family=families(),
    text=token_lists(1, 10),
    taps=st.lists(st.integers(0, LAYERS), unique=True, max_size=4).map(sorted),
)
@torch.inference_mode()
def test_taps_are_the_residual_stream_between_layers(family: str, text: list[int], taps: list[int]) -> None:
    model = tiny_model(0, family)
    routed = RoutedModel(model)
    states = routed.full(row(text), over(routed.new_cache(len(text)), 0, len(text)), taps)
    seen: list[Tensor] = [model.get_input_embeddings()(row(text))]
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[-1])) for layer in routed.layers]
    model(input_ids=row(text))
    for hook in hooks:
        hook.remove()
    assert states.tapped.shape == (1, len(text), len(taps), model.config.hidden_size)
    for place, tap in enumerate(taps):
        assert_near(states.tapped[:, :, place], seen[tap])


@torch.inference_mode()
def test_taps_of_the_slim_verifier_count_the_verifiers_layers() -> None:
    routed = RoutedModel(tiny_model(), Route(attention_skip=[1, 2], mlp_skip=[1, 2]))
    text = row([4, 7, 9])
    tapped = routed.slim(text, over(routed.new_cache(3), 0, 3), (1, 2, 3, 4)).tapped
    assert torch.equal(tapped[:, :, 0], tapped[:, :, 1])  # layers 1 and 2 are skipped
    assert torch.equal(tapped[:, :, 1], tapped[:, :, 2])
    assert not torch.allclose(tapped[:, :, 2], tapped[:, :, 3], atol=1e-3)
