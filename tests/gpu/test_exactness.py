"""In float32 every lossless strategy writes the autoregressive text, on tiny and on given models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.gpu.settings import read_settings
from tests.gpu.targets import TINY, OpenTarget, find_targets
from viasd_calib.choices import STRATEGIES
from viasd_calib.decoding.engine import Engine, load_engine
from viasd_calib.decoding.strategies.base import load_strategy
from viasd_calib.evaluation.exactness import find_difference
from viasd_calib.models import encode_prompt
from viasd_calib.prompts import draw_prompts, read_prompts

pytestmark = pytest.mark.gpu

LOSSLESS = [name for name in STRATEGIES if load_strategy(name).is_lossless("strict") and name != "autoregressive"]
NAMES = [target.name for target in find_targets(read_settings())]
TOKENS = {TINY: 48}
"""Of a text; ``OTHERS`` for all but the tiny model."""
OTHERS = 32
PROMPTS = {TINY: 8}
"""Prompts; ``FEW`` for all but the tiny model."""
FEW = 3


@dataclass(frozen=True)
class References:
    """An engine in float32, prompts, and the autoregressive text of each."""

    engine: Engine
    prompts: list[list[int]]
    texts: list[list[int]]
    count: int


@pytest.fixture(scope="module", params=NAMES)
def references(request: pytest.FixtureRequest, targets: list[OpenTarget], device: torch.device) -> References:
    opened = next(one for one in targets if one.target.name == request.param)
    engine = load_engine(
        opened.spec, verifier=opened.target.verifier, draft_model=opened.target.draft_model,
        dtype="float32", device=str(device), backend="eager",
    )  # fmt: skip
    count = TOKENS.get(request.param, OTHERS)
    chosen = draw_prompts(read_prompts(opened.prompts), PROMPTS.get(request.param, FEW))
    prompts = [encode_prompt(engine.verifier, prompt, [], count) for prompt in chosen]
    decoder = engine.decoder("autoregressive")
    return References(engine, prompts, [decoder.generate(prompt, count).tokens for prompt in prompts], count)


@pytest.mark.parametrize("strategy", LOSSLESS)
def test_a_strict_text_is_the_autoregressive_one(
    strategy: str, references: References, record_property: Callable[[str, object], None]
) -> None:
    """Token by token, alone and in a batch; a text may leave it where rounding explains the gap, and that is counted.

    In float32 that is one token in some ten thousand: of all texts of a strategy at most one may.
    """
    kind = load_strategy(strategy)
    decoder = references.engine.decoder(strategy, audit="strict" if kind.takes_audit else None)
    alone = [decoder.generate(prompt, references.count).tokens for prompt in references.prompts]
    together = [text.tokens for text in decoder.generate_batch(references.prompts, references.count)]
    left = []
    for texts in (alone, together):
        for number, (prompt, tokens, wanted) in enumerate(
            zip(references.prompts, texts, references.texts, strict=True)
        ):
            found = find_difference(references.engine.routed, str(number), 0, prompt, tokens, wanted)
            if found is not None:
                left.append(found)
    record_property("texts", len(alone) + len(together))
    record_property("tokens", sum(map(len, references.texts)))
    record_property("left_at_a_near_tie", len(left))
    assert [one for one in left if not one.explained] == []
    assert len({one.prompt_id for one in left}) <= 1
