"""A draft model whose context is shorter than the text drafts as far as it can, and the text goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from tests.tiny import (
    VOCAB,
    longrope_config,
    make_model,
    save_tiny,
    tiny_config,
    tiny_model,
    tiny_prompts,
    transformers_text,
)
from viasd_calib.calibration.scoring import score_texts
from viasd_calib.decoding.decoder import Decoder
from viasd_calib.decoding.slim_rules.ratio import RatioRule
from viasd_calib.decoding.strategies.base import Strategy
from viasd_calib.decoding.strategies.speculative import Speculative
from viasd_calib.decoding.strategies.three_tier import ThreeTier
from viasd_calib.draft.base import Drafter
from viasd_calib.draft.causal import CausalDrafter
from viasd_calib.draft.combined import CombinedDrafter
from viasd_calib.models import load_verifier
from viasd_calib.slim.forward import RoutedModel
from viasd_calib.spec import Route
from viasd_calib.traces.capture import CaptureSettings, capture_traces
from viasd_calib.traces.texts import read_texts

CONTEXT = 16
PROMPTS = [[7, 8, 9], [4, 4, 5, 6, 3, 11, 12, 2], [*range(3, 23)]]
"""The last is longer than the draft model's context."""


def rotary(kind: str, **more: object) -> dict[str, object]:
    return {"rope_type": kind, "factor": 2.0, "rope_theta": 100.0, **more}


SHORT: dict[str, PreTrainedConfig] = {
    "plain": tiny_config(max_position_embeddings=CONTEXT),
    "longrope": longrope_config(CONTEXT),
    "dynamic": tiny_config(max_position_embeddings=CONTEXT, rope_parameters=rotary("dynamic")),
    "yarn": tiny_config(
        max_position_embeddings=CONTEXT, rope_parameters=rotary("yarn", original_max_position_embeddings=8)
    ),
}


def drafter_of(config: PreTrainedConfig, combined: bool = False) -> Drafter:
    torch.manual_seed(1)
    model = CausalDrafter(RoutedModel(make_model(config)), VOCAB)
    return CombinedDrafter(model, VOCAB, max_ngram=3, min_ngram=2) if combined else model


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("combined", [False, True])
def test_texts_go_on_without_drafts(kind: str, combined: bool) -> None:
    """Alone and in a batch, exact, with the same counts; the model takes no step after its context."""
    methods: list[Strategy] = [Speculative(4), ThreeTier(RatioRule(0.9, 0.5), draft_length=4)]
    for method in methods:
        drafter = drafter_of(SHORT[kind], combined)
        assert drafter.context == CONTEXT
        decoder = Decoder(RoutedModel(tiny_model(), Route(attention_skip=[1])), drafter, method)
        alone = [decoder.generate(prompt, 30) for prompt in PROMPTS]
        assert [one.tokens for one in alone] == [transformers_text(tiny_model(), prompt, 30, ()) for prompt in PROMPTS]
        assert decoder.generate_batch(PROMPTS, 30) == alone
        assert alone[0].counts.draft_steps > 0
        assert alone[2].counts.draft_steps == 0


def test_traces_of_long_texts_say_where_nothing_is_drafted(tmp_path: Path) -> None:
    """And gates learn from the other places alone."""
    verifier = load_verifier(str(save_tiny(tmp_path / "verifier", eos=None)))
    drafter = drafter_of(SHORT["plain"])
    capture_traces(verifier, drafter, "short", tiny_prompts(3), tmp_path / "traces", CaptureSettings(max_new_tokens=24))
    texts = read_texts(tmp_path / "traces")
    for text, scored in zip(texts, score_texts(RoutedModel(verifier.model), texts, 4), strict=True):
        places = torch.arange(text.prompt_length - 1, len(text.ids) - 1)
        assert torch.equal(text.p_token >= 0, places < CONTEXT)
        assert torch.equal(scored.proposed, places < CONTEXT)
        assert scored.blocks.drafted.any()
        assert not (scored.blocks.drafted & ~scored.proposed).any()
        assert scored.blocks.undrafted[~scored.proposed].all(), "q' goes on alone"
        assert len(scored.draft_candidates().agrees) == int(scored.blocks.drafted.sum())
