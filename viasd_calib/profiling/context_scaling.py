"""How the time of a decoded token grows with context, beside what attention alone must take there."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from viasd_calib.choices import StrategyName
from viasd_calib.decoding.engine import Engine
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.draft.shallow import ShallowDrafter
from viasd_calib.errors import PlanningError
from viasd_calib.models import context_length
from viasd_calib.profiling.profile import RoundPart, RoundTimes, TierName
from viasd_calib.profiling.recording import PASSES, RecordedText, Span
from viasd_calib.progress import steps
from viasd_calib.slim.cache import CacheWindow, SharedCache
from viasd_calib.slim.cost import interleaved_seconds
from viasd_calib.slim.families import LayerType, layer_types_of, window_of

ROUND_METHODS: tuple[StrategyName, ...] = ("autoregressive", "speculative", "three_tier")
ROUND_TOKENS = 32
"""Tokens decoded after each context."""

CallName = tuple[TierName, str]
"""A tier, and which of its calls."""


@dataclass(frozen=True)
class AttentionStack:
    """The attention sublayers that one pass of a tier runs.

    Attributes:
        config: of the model they belong to.
        layers: the type of each.
    """

    config: PreTrainedConfig
    layers: tuple[LayerType, ...]


def attention_stacks(engine: Engine) -> dict[TierName, AttentionStack]:
    """By tier; a drafter that does not attend has none."""
    routed = engine.routed
    slim = tuple(one.layer_type for one in routed.slim_sublayers if one.kind == "attention")
    stacks: dict[TierName, AttentionStack] = {
        "full": AttentionStack(routed.config, tuple(routed.layer_types)),
        "slim": AttentionStack(routed.config, slim),
    }
    match engine.drafter:
        case CausalDrafter(model=model) | CombinedDrafter(model=CausalDrafter(model=model)):
            stacks["draft"] = AttentionStack(model.config, tuple(model.layer_types))
        case ShallowDrafter(model=shallow) | CombinedDrafter(model=ShallowDrafter(model=shallow)):
            stacks["draft"] = AttentionStack(shallow.config, tuple(layer_types_of(shallow.config)))
    return stacks


def attention_alone(stack: AttentionStack, width: int, context: int, like: Tensor) -> Callable[[], object]:
    """Scaled dot-product attention of one pass, and nothing else, over keys and values as the cache holds them.

    Every query head reads its key and value head in place; a sliding layer reads its window alone.

    Args:
        width: new tokens of the pass.
        context: cached tokens before them.
        like: whose dtype and device are taken.
    """
    config = stack.config
    cache = SharedCache(config, context + width, dtype=like.dtype, device=like.device)
    heads, head_width = config.num_attention_heads, cache.keys.shape[-1]
    query = torch.randn(1, heads, width, head_width, dtype=like.dtype, device=like.device)
    window = CacheWindow(cache, context, width, context + width)
    begins: dict[LayerType, int] = {}
    masks: dict[LayerType, Tensor | None] = {}
    for kind in set(stack.layers):
        reach = window_of(config, kind)
        begins[kind] = 0 if reach is None else max(0, context + 1 - reach)
        mask = window.mask(reach)
        masks[kind] = None if mask is None else mask[..., begins[kind] :]

    def run() -> None:
        for slot, kind in enumerate(stack.layers):
            keys, values = cache.keys[slot, :, :, begins[kind] :], cache.values[slot, :, :, begins[kind] :]
            torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=masks[kind], enable_gqa=True
            )

    return run


@torch.inference_mode()
def measure_rounds(engine: Engine, contexts: Sequence[int], repeats: int) -> tuple[RoundTimes, ...]:
    """Decode after texts of random tokens with each of ``ROUND_METHODS``, and say what a token took.

    What the models make of random tokens differs from context to context by chance, and with it how many passes
    a token takes. So each context is charged its own median seconds of every call, times the calls a token took
    over all contexts together. Texts take turns, in an order drawn anew, so that drift strikes all alike.

    Args:
        contexts: tokens of each text, in rising order.
        repeats: timed rounds of attention alone.

    Raises:
        PlanningError: a context leaves no room for a token after it.
    """
    texts = {name: {context: _text(engine, name, context) for context in contexts} for name in ROUND_METHODS}
    live = [text for of_method in texts.values() for text in of_method.values()]
    draw = random.Random(0)
    with steps("rounds", len(live), "texts", timed=True) as running:
        while live:
            draw.shuffle(live)
            going = [text for text in live if text.advance()]
            running.advance(len(live) - len(going))
            live = going
    return tuple(entry for name in ROUND_METHODS for entry in _round_times(engine, name, texts[name], repeats))


def _text(engine: Engine, name: StrategyName, context: int) -> RecordedText:
    generator = torch.Generator().manual_seed(context)
    prompt = torch.randint(engine.routed.config.vocab_size, (context,), generator=generator).tolist()
    room = min(context_length(stack.config) for stack in attention_stacks(engine).values()) - context
    if room < 1:
        raise PlanningError(f"context {context} leaves no room for a token after it; give shorter --contexts")
    return RecordedText(engine, name, prompt, min(ROUND_TOKENS, room), may_end=False)


def _round_times(
    engine: Engine, name: StrategyName, texts: Mapping[int, RecordedText], repeats: int
) -> list[RoundTimes]:
    tokens = sum(text.tokens for text in texts.values())
    calls: dict[CallName, list[Span]] = _by_call(texts.values())
    rounds = sum(len(text.rounds) for text in texts.values())
    attention = _attention_seconds(engine, calls, list(texts), tokens, repeats)
    found: list[RoundTimes] = []
    for context, text in texts.items():
        own = _by_call([text])
        seconds: dict[RoundPart, float] = {}
        for key, spans in calls.items():
            median = statistics.median(span.seconds for span in own.get(key, spans))
            seconds[key[0]] = seconds.get(key[0], 0.0) + median * len(spans) / tokens
        seconds["rest"] = statistics.median(one.rest for one in text.rounds) * rounds / tokens
        found.append(
            RoundTimes(
                method=name,
                context=context,
                tokens=text.tokens,
                rounds=len(text.rounds),
                seconds=seconds,
                attention=attention[context],
            )
        )
    return found


def _by_call(texts: Iterable[RecordedText]) -> dict[CallName, list[Span]]:
    """Every recorded span, by tier and call, in the order of the tiers."""
    found: dict[CallName, list[Span]] = {}
    for text in texts:
        for one in text.rounds:
            for span in one.spans:
                found.setdefault((span.tier, span.call), []).append(span)
    tiers = get_args(TierName)
    return dict(sorted(found.items(), key=lambda item: tiers.index(item[0][0])))


def _attention_seconds(
    engine: Engine, calls: Mapping[CallName, list[Span]], contexts: Sequence[int], tokens: int, repeats: int
) -> dict[int, float]:
    """Seconds of attention alone that a token takes, by context, where each tier's passes are of median width."""
    stacks, like = attention_stacks(engine), engine.routed.final_norm_module.weight
    assert isinstance(like, Tensor), "every norm has a weight"
    passes = {
        tier: [span.width for span in spans]
        for (tier, call), spans in calls.items()
        if call in PASSES and tier in stacks
    }
    runs = [
        attention_alone(stacks[tier], statistics.median_low(widths), context, like)
        for context in contexts
        for tier, widths in passes.items()
    ]
    taken = iter(interleaved_seconds(runs, repeats, engine.routed.device))
    return {
        context: sum(len(widths) / tokens * statistics.median(next(taken)) for widths in passes.values())
        for context in contexts
    }
